"""Parts of the official models' modules that do not exist here, so that setting them would do nothing."""

from typing import Any, ClassVar

from torch import nn

from ..errors import UserError
from .own import is_ours


class WithoutOfficialParts(nn.Module):
    """Refuses to be given the parts in ``absent``. Subclasses outside of this package may use these names, as
    may modules whose ``forward`` was replaced before."""

    absent: ClassVar[tuple[str, ...]] = ()

    def __setattr__(self, name: str, value: Any) -> None:
        off = (
            value is None or isinstance(value, nn.Identity) or (isinstance(value, nn.Dropout) and not value.p)
        )
        if name in self.absent and not off and is_ours(type(self)) and "forward" not in vars(self):
            cls = type(self).__name__
            raise UserError(
                f"{name}: got a {type(value).__name__}, which {cls} would not use; expected a subclass of "
                f"{cls} that does, or {cls}.forward replaced first (docs/own_models.md)"
            )
        super().__setattr__(name, value)
