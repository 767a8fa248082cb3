"""torch-fidelity's Inception: the network that defines FID, with its weights of 2015, and ADM's spatial
features."""

import hashlib
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import UserError, one_line

INCEPTION = "inception-v3-compat"
FILE = "weights-inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{FILE}"
PUBLISHED = FILE.removesuffix(".pth").rpartition("-")[2]  # the first digits of its sha256


class Inception(nn.Module):
    """uint8 [B, C, H, W], C 3 or 1 (repeated) to ``pooled`` [B, 2048], ``spatial`` [B, 192, 17, 17] and
    ``logits`` [B, 1008] without the last bias, all as in ADM's evaluator.

    ADM's ``mixed_6/conv`` is the 1x1 branch of the block that torch-fidelity calls Mixed_6d, after the ReLU.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        self.spatial: Tensor | None = None
        network.get_submodule("Mixed_6d.branch1x1").register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: object, output: Tensor) -> None:
        self.spatial = output

    def forward(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        pooled, logits = self.network(images_BCHW.expand(-1, 3, -1, -1))
        assert self.spatial is not None
        found = {"pooled": pooled, "spatial": self.spatial, "logits": logits}
        self.spatial = None
        return found


def is_published(identity: str) -> bool:
    """Whether features come from the network that defines FID, with its own weights."""
    return identity.startswith(f"{INCEPTION} sha256:{PUBLISHED}")


def load_inception(weights: str | None) -> tuple[str, Inception]:
    """The network's identity and the network, with weights from a local file, by default where torch-fidelity
    would have put it. Never downloads: a ``UserError`` says which files to get."""
    path = Path(weights) if weights is not None else Path(torch.hub.get_dir()) / "checkpoints" / FILE
    lacking = []
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        lacking.append(
            f"comes with torch-fidelity, which cannot be imported ({error}); install it and torchvision with "
            "pip install 'mdt-fast[fid]'"
        )
    if not path.is_file():
        wrong = (
            "needs its weights" if weights is None else f"needs its weights, --weights: no file {weights!r}"
        )
        lacking.append(f"{wrong}; get {URL} and give it by --weights FILE or put it at {str(path)!r}")
    if lacking:
        other = "or give another network by --features MODULE:NAME or FILE"
        raise UserError(f"features: {INCEPTION} {'; and it '.join(lacking)}; {other}")
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    try:
        # torch-fidelity would unpickle the file whatever it contains: it gets a copy with only the tensors.
        state = torch.load(path, map_location="cpu", weights_only=True)
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / FILE
            torch.save({name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}, copy)
            network = FeatureExtractorInceptionV3(
                INCEPTION, ["2048", "logits_unbiased"], feature_extractor_weights_path=str(copy)
            )
    except Exception as error:
        reason = one_line(error)
        raise UserError(
            f"weights: {str(path)!r} does not hold the weights of {INCEPTION}: {reason}"
        ) from error
    published = "" if digest.startswith(PUBLISHED) else " (not the published weights)"
    return f"{INCEPTION} sha256:{digest[:16]}{published}", Inception(network.eval())
