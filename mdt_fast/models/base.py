"""What MDT v1, MDTv2 and DiT share: constructor, embeddings, output layer, guidance.

B batch, S side of the image (or latent), C its channels, O output channels, L tokens, D width.
"""

import warnings
from collections.abc import Callable, Iterator
from inspect import isfunction
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..config import Family, ModelConfig, Switches
from ..diffusion.checks import readable
from ..diffusion.guidance import channels_to_guide, guide, power_cosine_scale
from ..errors import UserError
from ..kernels import attention_backends
from ..kernels.checks import plain_only
from ..masking import MaskPlan
from ..reference.init import initialise
from .attention import Attention, share_index
from .blocks import Block, FinalLayer, unpatchify
from .checkpointing import CHECKPOINTING
from .conditioning import Conditioning, conditioning
from .embed import LabelEmbedder, PatchEmbed, TimestepEmbedder
from .hub import Pretrained
from .own import is_itself, is_ours, takes_ours
from .rows import WHOLE, Rows

AUTOCAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

OFFICIAL_METHODS = {
    "random_masking": "draw_plan(batch, device), which returns a MaskPlan",
    "forward_side_interpolater": "join(x, c, plan)",
}
"""The official models' methods that these models do not have, and what to override instead."""


class Transformer(Pretrained):
    """Base class of the three models. The constructor takes the official arguments.

    ``input_size`` S is the side of the image or latent, ``mlp_ratio`` the MLP's width divided by D,
    ``class_dropout_prob`` the fraction of labels dropped in training, ``mask_ratio`` the fraction of tokens
    dropped in a masked pass (None: never), ``decode_layer`` the number of decoder blocks (None: as published,
    4 in MDTv2 and 2 in MDT v1). ``attention_backend``: see :meth:`set_attention_backend`. Raises
    ``UserError`` for values that do not fit together.
    """

    family: Family
    trains_mask_token = True  # whenever there is a mask_ratio

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        mask_ratio: float | str | None = None,
        decode_layer: int | str | None = None,
        attention_backend: str = "auto",
    ) -> None:
        super().__init__()
        self.config = config = ModelConfig.of(
            self.family,
            input_size=input_size,
            patch_size=patch_size,
            in_channels=in_channels,
            hidden_size=hidden_size,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            class_dropout_prob=class_dropout_prob,
            num_classes=num_classes,
            learn_sigma=learn_sigma,
            mask_ratio=mask_ratio,
            decode_layer=decode_layer,
        )
        self.input_size, self.patch_size, self.in_channels = input_size, patch_size, in_channels
        self.out_channels, self.learn_sigma = config.out_channels, learn_sigma
        self.hidden_size, self.depth, self.num_heads = hidden_size, depth, num_heads
        self.decode_layer = config.decode_layer
        self.make_parameters()
        self.make_blocks()
        self.final_layer = FinalLayer(hidden_size, patch_size, config.out_channels)
        self.initialize_weights()
        self.switches = Switches()
        share_index(self)
        self.register_state_dict_post_hook(_separate_index)
        self.set_attention_backend(attention_backend)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name, instead in OFFICIAL_METHODS.items():
            if hasattr(cls, name) and not _is_called(cls, name):
                text = (
                    f"{name}: {cls.__name__} defines it, but the model does not call it; override {instead}"
                )
                warnings.warn(text, stacklevel=2)

    def initialize_weights(self) -> None:
        """Set the initial weights, with the official values for a seed; the constructor calls it."""
        initialise(self, self.config.grid_size)

    @property
    def mask_ratio(self) -> float | None:
        """The fraction of tokens dropped in training. Settable; ``UserError`` for a value not allowed."""
        return self.config.mask_ratio

    @mask_ratio.setter
    def mask_ratio(self, value: float | str | None) -> None:
        before = self.config.mask_ratio
        self.config = ModelConfig.of(self.family, **{**self.config.kwargs(), "mask_ratio": value})
        if (before is None) != (self.config.mask_ratio is None):
            if before is not None:  # frozen ones stay frozen
                self.trains_mask_token = self.mask_token.requires_grad
            self.mask_token.requires_grad_(before is None and self.trains_mask_token)

    @property
    def num_classes(self) -> int:
        """The number of classes, which is also the index of the null class: that of ``y_embedder``."""
        return self.y_embedder.num_classes if self.takes_labels else self.config.num_classes

    @num_classes.setter
    def num_classes(self, value: int) -> None:
        if value != self.num_classes:
            raise UserError(
                f"num_classes: got {value!r}, expected {self.num_classes}; replace y_embedder instead"
            )

    def set_attention_backend(self, name: str) -> None:
        """Choose what computes attention: ``auto`` (Triton on CUDA, else csrc or PyTorch), or a backend
        listed by :func:`mdt_fast.kernels.attention_backends`. Raises ``UserError`` for any other name. A
        library that does not support its inputs raises ``ValueError`` when it is called.
        """
        known = ("auto", *(row.op for row in attention_backends()))
        if name not in known:
            raise UserError(f"attention_backend: got {name!r}, expected {', '.join(known)}")
        for module in self.modules():
            if isinstance(module, Attention):
                module.attention_backend = name

    def make_parameters(self) -> None:
        """Make all parameters except those of the blocks and the last layer."""
        config = self.config
        L, D = config.grid_size**2, config.hidden_size
        self.pos_embed = nn.Parameter(torch.zeros(1, L, D), requires_grad=self.family != "dit")
        if self.family != "dit":
            self.decoder_pos_embed = nn.Parameter(torch.zeros(1, L, D))
            self.mask_token = nn.Parameter(torch.zeros(1, 1, D), requires_grad=config.mask_ratio is not None)
        self.x_embedder = PatchEmbed(config.patch_size, config.in_channels, D)
        self.t_embedder = TimestepEmbedder(D)
        self.y_embedder = LabelEmbedder(config.num_classes, D, config.class_dropout_prob)

    def make_blocks(self) -> None:
        """Make the blocks, under the names used in the ``state_dict``."""
        raise NotImplementedError

    def blocks_of(self, number: int, skip: bool = False) -> nn.ModuleList:
        config = self.config
        grid_size = None if self.family == "dit" else config.grid_size
        return nn.ModuleList(
            Block(config.hidden_size, config.num_heads, config.mlp_ratio, grid_size, skip)
            for _ in range(number)
        )

    def set_switches(self, switches: Switches) -> None:
        """Choose the model's optimisations over a plain implementation; see :class:`Switches`. Call this
        before ``torch.compile``."""
        if not isinstance(switches, Switches):
            raise UserError(f"switches: got {type(switches).__name__}, expected a Switches")
        for module in self.modules():
            if isinstance(getattr(module, "switches", None), Switches):
                vars(module)["switches"] = switches

    def set_checkpointing(self, mode: str) -> None:
        """Choose what the backward pass recomputes instead of keeping: ``none`` (but see :class:`Switches`),
        ``selective`` (each block except its attention) or ``full`` (each block). Raises ``UserError`` for any
        other mode.
        """
        if mode not in CHECKPOINTING:
            raise UserError(f"checkpointing: got {mode!r}, expected {', '.join(CHECKPOINTING)}")
        for block in self.every_block():
            block.checkpointing = mode

    def condition(self, t: Tensor, y: Tensor, drop: bool = False) -> Conditioning:
        """The conditioning for times and labels [B]; ``drop`` drops some labels, as in training."""
        by_itself = drop and self.drops_by_itself
        c = self.t_embedder(t) + self.y_embedder(self.drop_labels(y) if drop else y, by_itself)
        return conditioning(c, list(self.every_block()), batched=self.switches.batched_adaln)

    def mark_lengths(self, x: Tensor, rows: Rows, plan: MaskPlan) -> None:
        """A hook to mark sizes that depend on the number of kept tokens, set by ``compile_for_training``."""

    def drop_labels(self, y: Tensor) -> Tensor:
        """Labels y [B], some of them replaced by the null class in training; in eval mode y itself. A custom
        embedder can do the same with ``dropout_prob`` and a method ``drop``. One that drops by itself does so
        later, when :meth:`condition` calls it; here it gets y back."""
        if not self.training or self.drops_by_itself:
            return y
        embedder = self.y_embedder
        return embedder.drop(y) if getattr(embedder, "dropout_prob", 0) > 0 else y

    @property
    def drops_by_itself(self) -> bool:
        """Whether the embedder is told about training, and drops conditions in its own ``forward``, as the
        official one does: one without ``drop``, or of a subclass with another ``forward`` alone."""
        embedder = self.y_embedder
        if not isinstance(embedder, LabelEmbedder):
            return not hasattr(embedder, "drop")
        cls = type(embedder)
        return cls.forward is not LabelEmbedder.forward and cls.drop is LabelEmbedder.drop

    @property
    def takes_labels(self) -> bool:
        """Whether y is a batch of labels [B], and not the input [B, ...] of a custom embedder."""
        return isinstance(self.y_embedder, LabelEmbedder)

    def every_block(self) -> Iterator[Block]:
        """All blocks in the order of ``modules()``, but without walking its hundreds of modules: this is
        called in every step."""
        return iter(dict.fromkeys(_blocks_in(self)))

    def every_token(self, x: Tensor) -> Tensor:
        """Embed images as tokens [B, L, D], with positions. An embedder that is replaced or observed does
        not get these: they are added to what it returns."""
        embedder: Any = self.x_embedder
        whole = is_itself(embedder, PatchEmbed)
        tokens: Tensor = embedder(x, self.pos_embed) if whole else embedder(x) + self.pos_embed
        return tokens

    def run(self, block: Any, x: Tensor, c: Conditioning, rows: Rows = WHOLE, **kwargs: Any) -> Tensor:
        """Run one block."""
        if takes_ours(block, Block):
            ours = {"activated": c.activated, "modulation": c.modulations.get(block)}
            return block(x, c.plain, rows=rows, **ours, **kwargs)
        return run_as_it_is(block, x, c.plain, rows, **kwargs)

    def image(self, x: Tensor, c: Conditioning) -> Tensor:
        """Turn tokens [B, L, D] into images [B, O, S, S]."""
        layer = self.final_layer
        if takes_ours(layer, FinalLayer):
            patches = layer(x, c.plain, activated=c.activated, modulation=c.modulations.get(layer))
        else:
            patches = layer(x, c.plain)
        return self.unpatchify(patches)

    def unpatchify(self, x: Tensor) -> Tensor:
        """Turn patches [B, L, p*p*O] into images [B, O, S, S]."""
        return unpatchify(x, self.patch_size, self.out_channels)

    def forward_with_cfg(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        cfg_scale: float | Tensor | None = None,
        diffusion_steps: int = 1000,
        scale_pow: float | None = 4.0,
    ) -> Tensor:
        """Output under classifier-free guidance: [2n, O, S, S], the same guidance in both halves.

        ``x`` [2n, C, S, S]: its first n samples are used for both halves; ``t`` [2n]; ``y`` [2n]: n classes,
        then the null class n times. ``cfg_scale``: a number, or one per sample [n]; None calls plain
        :meth:`forward`. The guidance weight follows the power-cosine schedule, from 1 at ``t =
        diffusion_steps`` up to ``cfg_scale`` at 0; it is constant if ``scale_pow`` is None. With four
        channels the first three are guided and each half keeps its own for the rest, as published; with any
        other number all that it predicts are guided. Raises ``UserError`` for an odd batch.
        Source: MDT (arXiv:2303.14389), section 4.
        """
        if cfg_scale is None:
            return self(x, t, y)
        if len(x) % 2:
            raise UserError(f"x: got a batch of {len(x)}, expected an even one (classes, then null classes)")
        half = x[: len(x) // 2]
        cond, uncond = self(torch.cat([half, half]), t, y).chunk(2)
        scale = power_cosine_scale(t[: len(half)], cfg_scale, diffusion_steps, scale_pow)
        channels = channels_to_guide(self.in_channels, self.out_channels, self.learn_sigma)
        return guide(cond, uncond, scale, channels=channels)

    def in_a_loop(self, method: Callable[..., Tensor], calls: int) -> Callable[..., Tensor]:
        """Prepare ``method`` of this model (or the model itself) for a sampling loop that calls it ``calls``
        times with tensors of the same shapes. On a GPU each call becomes one launch (:class:`GraphedModel`),
        unless something wraps the model or a layer. For a model in half precision, x is cast to its dtype, as
        sampling loops keep x in float32.
        """
        from .graphed import in_a_loop

        return in_a_loop(self, method, calls)

    def check_inputs(self, x: Tensor, t: Tensor, y: Tensor, names: tuple[str, str] = ("x", "y")) -> None:
        """Raise ``UserError`` for inputs the model cannot take. Values are checked on the CPU only (no sync).
        ``names``: what error messages call x and y."""
        S, weight, (image, label) = self.input_size, self.pos_embed, names
        for name, v in ((image, x), ("t", t), (label, y)):
            if not isinstance(v, Tensor):
                raise UserError(f"{name}: got {type(v).__name__}, expected a torch.Tensor")
        if x.ndim != 4 or tuple(x.shape[1:]) != (self.in_channels, S, S):
            raise UserError(f"{image}: shape {list(x.shape)}, expected [B, {self.in_channels}, {S}, {S}]")
        # The meta device has no autocast, and must not be asked about it.
        if x.dtype != weight.dtype and not (
            x.dtype in AUTOCAST_DTYPES and torch.is_autocast_enabled(x.device.type)
        ):
            raise UserError(f"{image}: dtype {x.dtype}, the model's weights are {weight.dtype}")
        if x.device != weight.device:
            raise UserError(f"{image}: on {x.device}, the model is on {weight.device}")
        for name, v in (("t", t), (label, y)):
            if v.shape[: 1 if v is y and not self.takes_labels else None] != x.shape[:1]:
                raise UserError(
                    f"{name}: shape {list(v.shape)}, expected [{x.shape[0]}] (one per sample of {image})"
                )
            if v.device != x.device:
                raise UserError(f"{name}: on {v.device}, {image} is on {x.device}")
        if self.takes_labels and y.dtype not in (torch.int64, torch.int32):
            raise UserError(f"{label}: dtype {y.dtype}, expected torch.int64 or torch.int32")
        if t.dtype == torch.bool or t.is_complex():
            raise UserError(f"t: dtype {t.dtype}, expected integers or floating-point numbers")
        if not readable(x) or plain_only() or not len(x):
            return
        rows = self.y_embedder.embedding_table.num_embeddings if self.takes_labels else 0
        if rows and (y.min() < 0 or y.max() >= rows):
            null = " (the last is the null class)" if rows > self.num_classes else ""
            found = f"{int(y.min())}..{int(y.max())}"
            raise UserError(f"{label}: labels {found}, expected 0..{rows - 1}{null}")
        if not torch.isfinite(t).all():
            found = f"{t.min().item()}..{t.max().item()}"
            raise UserError(f"t: got values {found}, expected finite numbers")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # .to(), .cuda() and the like copy every buffer: make the layers share one index again.
        super()._apply(fn, recurse)
        share_index(self)
        return self

    def extra_repr(self) -> str:
        return ", ".join(f"{key}={value}" for key, value in self.config.kwargs().items())


def _is_called(cls: type, name: str) -> bool:
    """Whether a method, other than itself, of a class outside of this package mentions ``name``."""
    theirs = (each for each in cls.__mro__ if not is_ours(each))
    methods = [method for each in theirs for key, method in vars(each).items() if key != name]
    return any(name in method.__code__.co_names for method in methods if isfunction(method))


def _blocks_in(module: nn.Module) -> Iterator[Block]:
    for child in module.children():
        if isinstance(child, Block):
            yield child
        else:
            yield from _blocks_in(child)


def run_as_it_is(block: nn.Module, x: Tensor, c: Tensor, rows: Rows, **kwargs: Any) -> Tensor:
    """Run a block that something observes or replaces. Only what has a ``Block`` in it is told about masks:
    what stands in a block's place is called with x, c and, in MDTv2, ``skip``."""
    if type(block) is nn.Identity:
        return x
    if rows is not WHOLE:
        kwargs["rows"] = rows
        if not any(isinstance(module, Block) for module in block.modules()):
            raise UserError(
                f"model: got a {type(block).__name__} in a block's place, expected a Block or a module "
                "around one, as it has to be told which tokens a mask keeps"
            )
    result: Tensor = block(x, c, **kwargs)
    return result


def _separate_index(module: nn.Module, state: dict[str, Tensor], prefix: str, _: object) -> None:
    """A state_dict hook that unshares the index of all layers, as file formats may refuse shared memory."""
    keys = [key for key in state if key.startswith(prefix) and key.endswith("relative_position_index")]
    for key in keys[1:]:
        state[key] = state[key].clone()
