"""The folder that ``mdt-fast encode`` writes: shards, a JSON beside each, and finally the index."""

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import save_file
from torch import Tensor

from ..config import from_dict
from ..errors import UserError
from ..files import aside, flush, remove_leftovers, sha256_of, writable_folder
from ..processes import Ranks
from .latents import (
    INDEX,
    DamagedError,
    Encoding,
    Shard,
    is_encoded,
    read_signed,
    shard_name,
    sign,
)

OURS = re.compile(r"shard-\d{5,}\.(safetensors|json)")
AGAIN = "resume with the same command"
# Names of the settings on the command line, for messages about which one differs.
OPTIONS = {
    "image_size": "--image-size", "crop": "--crop", "mirrored": "mirrored", "dtype": "--dtype",
    "vae_dtype": "--vae-dtype", "vae_sha256": "--vae: weights with SHA-256", "scale": "--vae: scaling factor",
    "shift": "--vae: shift factor", "channels": "--vae: latent channels", "side": "--vae: latent side",
    "shard_size": "--shard-size",
}  # fmt: skip


class Folder:
    """Writes and checks the folder: shards, a JSON beside each, and finally the index."""

    def __init__(self, root: Path, encoding: Encoding, autoencoder: str, classes: tuple[str, ...]):
        self.root, self.encoding = root, encoding
        self.autoencoder, self.classes = autoencoder, classes
        self._records: dict[int, dict[str, Any]] = {}

    def prepare(self, ranks: Ranks) -> None:
        """Make the folder, or check that it is ours with the same settings; remove leftovers."""
        try:
            names = writable_folder(self.root)
        except OSError as error:
            raise UserError(f"out: cannot write in {str(self.root)!r}: {error.strerror}") from None
        ours = {INDEX} if is_encoded(self.root) else set()
        if foreign := sorted(name for name in names - ours if not OURS.fullmatch(name)):
            raise UserError(
                f"out: {str(self.root)!r} holds other files, such as {foreign[0]!r}; use an empty folder"
            )
        for path in sorted([*self.root.glob(INDEX), *self.root.glob("shard-*.json")]):
            self._check_same(path)
        # Each rank removes leftovers of its own shards only: other ranks may be writing theirs.
        mine = range(self.encoding.shards)[ranks.rank :: ranks.world]
        stale = {path for shard in mine for path in (shard_name(shard), self._beside(shard).name)}
        remove_leftovers(self.root, stale | ({INDEX} if ranks.rank == 0 else set()))

    def _check_same(self, path: Path) -> None:
        """``UserError`` if ``path`` was made with other settings or from another source."""
        try:
            found = from_dict(Encoding, read_signed(path).get("encoding"), str(path))
        except (DamagedError, TypeError):  # its shard will be made again
            return
        self._refuse_other(found)

    def _refuse_other(self, found: Encoding) -> None:
        """``UserError`` if ``found`` is not the encoding of this folder; it names the first difference."""
        for name, value in asdict(self.encoding).items():
            was = getattr(found, name)
            if was == value:
                continue
            if name == "source_samples":
                what = f"the source had {was} images, now it has {value}"
            elif name == "source_sha256":
                what = "the source has changed since (names, sizes or classes of its images)"
            else:
                what = f"{OPTIONS[name]} {was}, now it is {value}"
            raise UserError(
                f"out: {str(self.root)!r} was begun with other data or settings: {what}; "
                "encode into another folder"
            )

    def record(self, shard: int) -> dict[str, Any] | None:
        """The contents of the JSON beside a shard; None unless the shard is complete.

        ``UserError`` if another process has made it with other settings since ``prepare``.
        """
        if shard not in self._records:
            try:
                record = read_signed(self._beside(shard))
                from_dict(Shard, record["shard"]).check_size(self.root)
                encoding = from_dict(Encoding, record["encoding"])
            except (UserError, OSError, KeyError, TypeError):
                return None
            self._refuse_other(encoding)
            self._records[shard] = record
        return self._records[shard]

    def write(self, shard: int, tensors: dict[str, Tensor], dropped: list[dict[str, Any]]) -> None:
        """Write the shard, then the JSON that marks it as complete."""
        path = self.root / shard_name(shard)
        try:
            with aside(path) as file:
                save_file(tensors, file)
                written = Shard(path.name, len(tensors["labels"]), file.stat().st_size, sha256_of(file))
            with aside(self._beside(shard)) as file:
                values = {
                    "shard": asdict(written),
                    "dropped": dropped,
                    "encoding": asdict(self.encoding),
                }
                file.write_text(sign(values))
            flush(self.root)
        except (OSError, safetensors.SafetensorError) as error:
            raise UserError(f"cannot write {str(path)!r}: {error}; complete shards stay, {AGAIN}") from error

    def finish(self) -> tuple[Path | None, bool]:
        """The index, written if all shards are complete, and whether this call wrote it."""
        records = [self.record(shard) for shard in range(self.encoding.shards)]
        complete = [record for record in records if record is not None]
        dropped = [entry for record in complete for entry in record["dropped"]]
        if len(complete) < len(records):
            return None, False
        if len(dropped) == self.encoding.source_samples:
            raise UserError(f"SOURCE: none of its {len(dropped)} images can be read")
        text = sign(
            {
                "autoencoder": self.autoencoder,
                "encoding": asdict(self.encoding),
                "classes": list(self.classes),
                "dropped": dropped,
                "shards": [record["shard"] for record in complete],
            }
        )
        path = self.root / INDEX
        for _ in range(3):
            if path.exists() and path.read_bytes() == text.encode():
                return path, False
            try:
                with aside(path) as file:
                    file.write_text(text)
                flush(self.root)
                return path, True
            except FileNotFoundError:  # rank 0 was just starting, and removed our file as a leftover
                continue
            except OSError as error:
                raise UserError(f"cannot write {str(path)!r}: {error}; {AGAIN}") from error
        raise UserError(f"cannot write {str(path)!r}: another process keeps removing it; {AGAIN}")

    def _beside(self, shard: int) -> Path:
        return self.root / Path(shard_name(shard)).with_suffix(".json")
