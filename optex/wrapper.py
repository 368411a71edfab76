"""What torch expects of an optimizer that wraps another one."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

__all__ = ["OptimizerWrapper"]


class OptimizerWrapper(Optimizer):
    """A ``torch.optim.Optimizer`` whose groups and state are those of another.

    Attributes:
        base: that other optimizer.
    """

    _mixes = "the history"  # where gradients scaled by different factors would meet

    def __init__(self, base: Optimizer) -> None:
        self.base = base
        self._ready = False  # while torch's constructor runs, the groups are already the base's
        super().__init__(base.param_groups, base.defaults)
        self._ready = True

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's own groups, live."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        if self._ready:
            self.base.param_groups = groups

    @property
    def state(self) -> Any:
        """The base optimizer's own state, live."""
        return self.base.state

    @state.setter
    def state(self, state: Any) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        if self._ready:
            self.base.state = state

    @property
    def _step_supports_amp_scaling(self) -> bool:
        raise RuntimeError(
            f"{type(self).__name__}: torch.amp.GradScaler scales gradients by a factor that changes, and "
            f"{self._mixes} would mix them; use bfloat16 autocast, which needs no scaler"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "step"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._patch_step_function()
