"""Models in folders and on the hub: ``config.json`` and safetensors, laid out as a diffusers component.

huggingface_hub is needed only for network access. Pickled weights are never read.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from ..config import ModelConfig, from_dict
from ..errors import UserError, nearest, not_importable, one_line
from ..files import aside, remove_leftovers

CONFIG, WEIGHTS, CARD = "config.json", "diffusion_pytorch_model.safetensors", "README.md"
DIGEST = "config_sha256"
"""The weights' metadata key that identifies the config.json they were saved with."""
Token = str | bool | None


class Pretrained(nn.Module):
    """Loading and saving of a :class:`~mdt_fast.models.Transformer`, in folders and on the hub."""

    config: ModelConfig

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self._weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self._weight.dtype

    @property
    def _weight(self) -> nn.Parameter:
        return next(self.parameters())

    def save_pretrained(self, save_directory: str | os.PathLike[str], *, license: str | None = None) -> None:
        """Write ``config.json``, the weights as safetensors and, if there is no README.md, a model card.

        ``license``: the license named in the card, such as "apache-2.0". Existing files are replaced; if
        saving is interrupted between them, loading refuses the folder. Raises ``UserError`` if the folder
        cannot be written, for a model on the meta device or one with parts of its own, which
        ``from_pretrained`` could not build, or if each process holds a part of the weights.
        """
        self.save_component(save_directory)
        card = Path(save_directory) / CARD
        if not card.exists():
            with aside(card) as file:
                file.write_text(model_card(self.config, license), encoding="utf-8")

    def save_component(self, save_directory: str | os.PathLike[str], safe_serialization: bool = True) -> None:
        """:meth:`save_pretrained` without the card, for a component of a pipeline's folder."""
        from .convert import write_weights
        from .own_parts import differing_parts
        from .zoo import CLASSES

        if not os.fspath(save_directory):
            raise UserError("save_directory: got '', expected a name")
        if not safe_serialization:
            raise UserError("safe_serialization: got False, expected True (weights are safetensors)")
        state = self.state_dict()
        with torch.device("meta"):
            plain: Any = CLASSES["fast"][self.config.family](**self.config.kwargs())
        other = sorted(state.keys() ^ plain.state_dict().keys())
        if other and type(self) is type(plain):
            raise UserError(
                f"save_pretrained: got additional parts ({', '.join(other[:3])}, ...), expected a model "
                "that from_pretrained can build; take them out or merge them, or save its state_dict"
            )
        if any(hasattr(value, "full_tensor") for value in state.values()):
            raise UserError(
                "save_pretrained: got a part of the weights in each process, expected all; save a checkpoint "
                "and use mdt-fast convert"
            )
        if type(self) is type(plain) and (parts := differing_parts(self, plain)):
            raise UserError(
                f"save_pretrained: got {'; '.join(parts[:2])}{', ...' if parts[2:] else ''}, expected "
                "a model that from_pretrained can build; save its state_dict instead"
            )
        if any(value.is_meta for value in state.values()):
            raise UserError("save_pretrained: got weights on the meta device, expected ones with values")
        folder = Path(save_directory)
        for name in (WEIGHTS, CONFIG):
            if (folder / name).is_dir():
                raise UserError(f"save_directory: got a folder {str(folder / name)!r}, expected a file")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"save_directory: cannot make the folder {str(folder)!r}: {error}") from None
        remove_leftovers(folder, [WEIGHTS, CONFIG, CARD])
        described = {"_class_name": CLASS_NAMES[self.config.family], **self.config.kwargs()}
        write_weights(folder / WEIGHTS, state, **{DIGEST: _digest(described)})
        with aside(folder / CONFIG) as file:
            file.write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: Token = None,
        revision: str | None = None,
        commit_message: str = "Upload model",
        create_pr: bool = False,
        license: str | None = None,
    ) -> str:
        """Upload what :meth:`save_pretrained` writes, in one commit; returns that commit's address.

        The repository is created if needed (``private`` None: by the account's default); an existing
        README.md is kept. ``token`` None: the one from ``hf auth login``. Raises ``UserError`` if
        huggingface_hub is missing or the hub refuses.
        """
        api = _hub().HfApi(token=token)

        def upload(folder: str) -> str:
            name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            own_card = api.file_exists(name, CARD, revision=revision)
            commit = api.upload_folder(
                repo_id=name, folder_path=folder, commit_message=commit_message, revision=revision,
                create_pr=create_pr, ignore_patterns=[CARD] if own_card else None,
            )  # fmt: skip
            return str(commit)

        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, license=license)
            return _told(f"push_to_hub: {repo_id!r}", upload, folder)

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        subfolder: str = "",
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: Token = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> Self:
        """Load a model, in eval mode, from a folder written by :meth:`save_pretrained` or from the hub.

        ``Transformer.from_pretrained`` loads any of the models; ``MDTv2``, ``MDT`` and ``DiT`` load their
        own, and a class derived from one of them makes a model of that class.
        ``subfolder``: within the folder or repository ("transformer" in a pipeline's). ``dtype``, or
        diffusers' name for it, ``torch_dtype``: the weights' dtype (float32, float16, bfloat16 or float64,
        from torch or by name); None: as saved. The other arguments are those of huggingface_hub's
        ``hf_hub_download``. A ``DiTTransformer2DModel`` of diffusers becomes a :class:`DiT`. Raises
        ``UserError`` for anything but such a folder, for weights that belong to another model, were saved
        with another config or are not finite, and for pickled weights.
        """
        from .attention import share_index
        from .convert import check_finite, check_sizes, check_weights, read_metadata, read_weights
        from .dit_of_diffusers import CLASSES as OTHERS
        from .dit_of_diffusers import config_of_diffusers, weights_of_diffusers
        from .zoo import CLASSES

        chosen = floating("torch_dtype", torch_dtype) if dtype is None else floating("dtype", dtype)
        how = {
            "subfolder": subfolder or None, "revision": revision, "cache_dir": cache_dir, "token": token,
            "local_files_only": local_files_only, "force_download": force_download,
        }  # fmt: skip
        get = _local_files(Path(name), subfolder) or _hub_files(str(name), how)
        file = get(CONFIG)
        values = read_config(file)
        kind = values["_class_name"]
        other = kind in OTHERS
        config = config_of_diffusers(values, file) if other else _config(values, file)
        found: Any = CLASSES["fast"][config.family]
        if issubclass(cls, found):  # a user's subclass
            found = cls
        if not issubclass(found, cls):
            raise UserError(
                f"{file}: got the class {found.__name__}, expected {cls.__name__}; "
                f"{found.__name__}.from_pretrained loads it"
            )
        weights = get(WEIGHTS)
        state = read_weights(weights)
        if other:
            state = weights_of_diffusers(state, config, weights)
        own = found is not CLASSES["fast"][config.family]
        if not own:  # the published classes, whose parts are known
            check_sizes(config, state, str(weights))
        try:
            # A derived class may make tensors that are not among the weights: they need their values.
            with torch.device("cpu" if own else "meta"):
                model = found(**config.kwargs())
        except TypeError as error:
            if not own:
                raise
            raise UserError(f"from_pretrained: {found.__name__} takes other arguments: {error}") from None
        check_weights(model.state_dict(), state, str(weights))
        if read_metadata(weights).get(DIGEST) not in (None, json.dumps(_digest(values))):
            raise UserError(
                f"{weights}: was saved with another config.json than the one beside it (saving was "
                "interrupted, or it was edited); save again, or put the config of these weights back"
            )
        check_finite(state, str(weights))
        model.load_state_dict(state, strict=True, assign=True)
        share_index(model)
        dtypes = {value.dtype for value in state.values() if value.is_floating_point()}
        if chosen is not None or len(dtypes) == 1:  # one for all weights is also that of other buffers
            model.to(chosen or dtypes.pop())
        return model.eval()


CLASS_NAMES = {"mdtv2": "MDTv2", "mdt": "MDT", "dit": "DiT"}


def model_card(config: ModelConfig, license: str | None = None) -> str:
    """A README.md for the hub: what the model is, and how to load it."""
    name = CLASS_NAMES[config.family]
    licence = [f"license: {license}"] if license else []
    head = ["library_name: mdt_fast", *licence, "pipeline_tag: unconditional-image-generation"]
    tags = ["tags:", *(f"- {tag}" for tag in ("mdt_fast", "diffusion", name.lower(), "image-generation"))]
    paper = "2212.09748" if config.family == "dit" else "2303.14389"
    S, C = config.input_size, config.in_channels
    return "\n".join(
        [
            "---", *head, *tags, "---", "", f"# {name}", "",
            f"A class-conditional diffusion transformer ([arXiv:{paper}](https://arxiv.org/abs/{paper})): "
            f"depth {config.depth}, width {config.hidden_size}, patches of {config.patch_size}, "
            f"{config.num_classes} classes, inputs of {C} x {S} x {S}.", "",
            "```python", f"from mdt_fast import {name}", "",
            f'model = {name}.from_pretrained("...")  # this repository\'s name', "```", "",
        ]
    )  # fmt: skip


def floating(argument: str, dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype allowed for weights, given as such or by name; ``UserError`` naming ``argument`` for others."""
    from .convert import FLOATS

    names = {str(allowed).removeprefix("torch."): allowed for allowed in FLOATS}
    found = names.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if dtype is None or found in FLOATS:
        return found
    raise UserError(f"{argument}: got {dtype!r}, expected {', '.join(names)}")


def saved_in(folder: Path) -> str | None:
    """The subfolder of a saved model: "", or "transformer" in a pipeline's folder; None if there is none."""
    for subfolder in ("", "transformer"):
        file = folder / subfolder / CONFIG
        if file.is_file() and '"_class_name"' in file.read_text(encoding="utf-8", errors="replace"):
            return subfolder
    return None


def read_config(file: Path) -> dict[str, Any]:
    """Read a ``config.json`` that names its class; ``UserError`` for anything else."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: not a readable config.json: {one_line(error)}") from None
    if not isinstance(values, dict) or not isinstance(values.get("_class_name"), str):
        run = "; it is a run's: mdt-fast convert makes model files from a run" if "train" in values else ""
        raise UserError(
            f"{file}: names no class (_class_name); a file that save_pretrained wrote is needed{run}"
        )
    return values


def _digest(values: dict[str, Any]) -> str:
    """Hash of a config.json's values. Its layout, and what others add under ``_`` names, do not count."""
    counted = {key: value for key, value in values.items() if key == "_class_name" or not key.startswith("_")}
    return hashlib.sha256(json.dumps(counted, sort_keys=True).encode()).hexdigest()


def _config(values: dict[str, Any], file: Path) -> ModelConfig:
    kind, families = values["_class_name"], {name: family for family, name in CLASS_NAMES.items()}
    if kind not in families:
        hint = nearest(kind, families)
        raise UserError(f"{file}: got _class_name {kind!r}{hint}, expected {', '.join(families)}")
    own = {key: value for key, value in values.items() if not key.startswith("_")}
    none = {"mask_ratio": None, "decode_layer": 0} if kind == "DiT" else {}
    return from_dict(ModelConfig, {"family": families[kind], **none, **own}, str(file))


def _local_files(path: Path, subfolder: str) -> Callable[[str], Path] | None:
    """A function that locates a folder's files; None if ``path`` looks like a name on the hub."""
    if not path.exists():
        if path.is_absolute() or str(path).startswith((".", "~")) or len(path.parts) != 2:
            raise UserError(f"from_pretrained: got {str(path)!r}, expected a folder or a hub name (me/mdt)")
        return None
    if path.is_file():
        raise UserError(
            f"from_pretrained: got the file {str(path)!r}, expected a folder; "
            "load_weights(model, read_weights(path)) takes a file of weights"
        )
    folder = path / subfolder

    def get(name: str) -> Path:
        file = folder / name
        if file.is_file():
            return file
        reason = ""
        if subfolder and not folder.is_dir():
            reason = f"; {str(path)!r} has no subfolder {subfolder!r}"
        elif (folder / "model_index.json").is_file():
            reason = "; it is a pipeline's: use MDTPipeline.from_pretrained, or subfolder='transformer'"
        elif (folder / "checkpoints").is_dir():
            reason = "; it is a run: mdt-fast convert makes model files from it"
        elif name == WEIGHTS and any(
            file for end in ("bin", "pt", "pth") for file in folder.glob(f"*.{end}")
        ):
            reason = "; pickled weights (.bin, .pt) are never read"
        raise UserError(f"from_pretrained: no {name} in {str(folder)!r}{reason}")

    return get


def _hub_files(repo_id: str, how: dict[str, Any]) -> Callable[[str], Path]:
    def get(name: str) -> Path:
        def download(name: str) -> Path:
            return Path(_hub().hf_hub_download(repo_id, name, **how))

        pickled = " (pickled weights, .bin or .pt, are never read)" if name == WEIGHTS else ""
        return _told(f"from_pretrained: no {name} of the hub's {repo_id!r}{pickled}", download, name)

    return get


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise not_importable("the hub needs huggingface_hub", error, "latents") from None
    return huggingface_hub


def _told(what: str, function: Callable[..., Any], *args: Any) -> Any:
    """Call ``function``; turn errors of the hub, the network and libraries into a one-line ``UserError``."""
    try:
        return function(*args)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what}: {one_line(error)}") from None
