"""One step of co-located RL on one device, end to end, in every way people do it: `python -m bench rl-step`.

Theory of operation. An engine (`engine`, a diffusers pipeline behind HTTP) and a trainer (`trainer`) are
processes of their own on one device, which does not hold what both need at once. The command's own process
(`command`, `run`, `ways`) drives them and uses no device. For each way it starts both afresh from one seed,
then:

    image -> drain -> sleep -> the trainer takes memory -> (its step) -> refit -> wake -> image

and times each arrow from outside, from the last image delivered to the first one with the new weights. The
trainer's step is deterministic, so after the same number of steps every way has the same weights and must
deliver the same image, bit for bit.

Invariants:
- a way that cannot run, or fails, is recorded with the reason, and with no number;
- the JSON file is whole after every cycle (`found`), whatever ends the run;
- what measures (`memory`) does so between the timed phases, or costs nothing that matters within them.
"""
