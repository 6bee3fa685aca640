"""Weights of the base that `qlora adapter inspect` compares an adapter with."""

from contextlib import suppress
from typing import TYPE_CHECKING

from qlora.errors import ModelError

if TYPE_CHECKING:
    from qlora.adapter.algebra.tensors import Adapter
    from qlora.storage.safetensors_files import ShardReader

CHEAP_BYTES = 4 * 2**30
"""`inspect` reads a base up to this size, to compare norms, even without --base"""


def base_weights(adapter: "Adapter", given: str | None) -> "ShardReader | None":
    """Return the weights of the base that the user gave, else of the recorded base if it is cached and small.

    The recorded base is used only if its weights are the ones from training: the files can have changed, and a run
    with a random base (base.init) used none.
    """
    from qlora.adapter.identity import IDENTITY_FILE, BaseIdentity, checkpoint_digest
    from qlora.storage.safetensors_files import ShardReader, find_checkpoint

    if given is not None:
        return ShardReader(find_checkpoint(given))
    name, revision = (adapter.config.get(key) for key in ("base_model_name_or_path", "revision"))
    if isinstance(name, str):
        with suppress(ModelError):
            identity = adapter.extra_files.get(IDENTITY_FILE)
            used = BaseIdentity.parse(identity).weights if identity else None
            weights = ShardReader(find_checkpoint(name, revision))
            small = sum(file.stat().st_size for file in weights.files) <= CHEAP_BYTES
            return weights if small and used in (None, checkpoint_digest(weights.files)) else None
    return None


def expert_norms(adapter: "Adapter", weights: "ShardReader | None", *, given: bool) -> dict[str, float]:
    """Return the norms of the base's matrices of all experts, by projection, for those that the adapter changes.

    Empty without weights.

    Args:
        adapter: the adapter.
        weights: the base's weights.
        given: True if the user gave them; if not, those without the adapter's experts give nothing.

    Raises:
        ModelError: the weights that the user gave do not have the adapter's experts.
    """
    if weights is None or not adapter.experts:
        return {}
    from qlora.adapter.algebra.apart import check_experts
    from qlora.model.load import load_architecture
    from qlora.quantization.stored_parameters import StoredParameters
    from qlora.recipe import Base

    try:
        model = load_architecture(Base(model=str(weights.folder)))
        check_experts(adapter, model)
        files = StoredParameters(model, adapter.experts, weights)
        files.require(adapter.experts)
        return {name: files.norm(name) for name in adapter.experts}
    except ModelError:
        if given:
            raise
        return {}
