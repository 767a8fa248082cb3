"""Parts of the official models' modules that do not exist here, so that setting them would do nothing."""

from typing import Any, ClassVar

from torch import nn

from ..errors import UserError


class WithoutOfficialParts(nn.Module):
    """Refuses to be given the parts in ``absent``. Subclasses outside of this package may use these names, as
    may modules whose ``forward`` was replaced before."""

    absent: ClassVar[tuple[str, ...]] = ()

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.absent and not isinstance(value, nn.Identity) and self._would_do_nothing():
            cls = type(self).__name__
            raise UserError(
                f"{name}: got a {type(value).__name__}, but {cls} does not have it, so this would have no "
                "effect; expected a subclass or another forward that uses it (docs/own_models.md)"
            )
        super().__setattr__(name, value)

    def _would_do_nothing(self) -> bool:
        ours = type(self).__module__.startswith(f"{__package__}.")
        return ours and "forward" not in vars(self)
