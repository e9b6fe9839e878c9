"""LoRA: what an adapter is (`state_dict`, `config`), which stored tensors it is about (`targets`), and the
two ways it gets into an engine.

*Merged on write* (`put.put_lora`): base + scale · B·A is computed by the trainer and written as an ordinary
refit. *Adapters only* (`put.put_adapter`): A, B and the scale become tensors of the version (`stored`), and
the engine hook merges them on its device.

Both compute with `merge.merge`, which is what makes their weights equal bit for bit.
"""
