"""CUDA without torch's allocator: checked driver calls, the pinned arena, and copies to and from it.

    driver    checked calls, primary contexts, streams and events
    pinning   the arena registered with the driver, window by window
    copies    runs between the arena and device addresses, at the speed of the link
    upload    a trainer's CUDA tensors into the arena (the only module here that knows torch)

Importing the package needs neither a GPU nor cuda-bindings; `driver.available()` says what is missing.
"""
