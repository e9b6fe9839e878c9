"""Engine state: what lies in an image behind the weights, saved at sleep and restored at wake.

Weights need no saving, the arena has them. Engine state (buffers and strays that the store does not
know) exists only here, so it is copied to a private host buffer before the memory goes, and back
after it came. It lies in the image so that its addresses are as stable as those of weights.

Invariant: the saved copy counts as the truth from `save` until `restored` is called, which happens
only once the wake that used it has succeeded; so a failed wake or unmap loses nothing.
"""

from __future__ import annotations

import torch


class EngineState:
    """The bytes of one image from `offset` to `offset + nbytes`."""

    def __init__(self, offset: int, nbytes: int) -> None:
        self._offset = offset
        self.nbytes = nbytes
        self._buffer: torch.Tensor | None = None
        self._saved = False

    @property
    def saved(self) -> bool:
        return self._saved

    def _part(self, image: torch.Tensor) -> torch.Tensor:
        return image[self._offset : self._offset + self.nbytes]

    def save(self, image: torch.Tensor) -> int:
        """Copy from the mapped image, unless a saved copy waits to be restored; bytes copied."""
        if self._saved or not self.nbytes:
            return 0
        if self._buffer is None:
            self._buffer = torch.empty(self.nbytes, dtype=torch.uint8)
        if image.device.type == "cuda":
            # Kernels on any stream may still be writing state; the copy waits for its own stream only.
            torch.cuda.synchronize(image.device)
        self._buffer.copy_(self._part(image))
        self._saved = True
        return self.nbytes

    def restore(self, image: torch.Tensor) -> int:
        """Copy the saved bytes, if any, into the mapped image; returns when they are there."""
        if not self._saved or self._buffer is None:
            return 0
        self._part(image).copy_(self._buffer)
        if image.device.type == "cuda":
            torch.cuda.synchronize(image.device)
        return self.nbytes

    def restored(self) -> None:
        """The image is the truth again. The buffer stays for the next sleep."""
        self._saved = False

    def current(self, image: torch.Tensor) -> torch.Tensor:
        """The bytes wherever they are now: the saved copy, or that part of the mapped image."""
        if self._saved and self._buffer is not None:
            return self._buffer
        return self._part(image)
