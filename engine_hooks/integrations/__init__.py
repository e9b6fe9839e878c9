"""Engines that people run, hooked into the store. Each module is for one of them and needs its packages;
nothing is imported here.

None has memory logic of its own: everything goes through `EngineHook`.
"""
