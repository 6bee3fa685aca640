"""The trained weights of a run, written and read: in checkpoints, as the best so far, and as the result."""

from pathlib import Path

from qlora.adapter.identity import EXPERTS_IN, BaseIdentity
from qlora.adapter.store import load_adapter, save_adapter
from qlora.data.prompt_files import write_system
from qlora.errors import ModelError
from qlora.storage import tensor_file
from qlora.training import checkpoint
from qlora.training.session import Session


def write_weights(session: Session, folder: Path) -> None:
    """Write the adapter (or the whole model, if all weights are trained) and the recipe into `folder`."""
    if session.recipe.adapter.facts.frozen_base:
        save_adapter(session.model, folder, base=session.base_identity)
    else:
        session.model.save_pretrained(folder, max_shard_size="4GB")  # type: ignore[operator]
        tensor_file.give_usual_permissions(folder)
    # So that the folder can be used without the run
    (folder / "recipe.yaml").write_text(session.recipe.to_yaml())
    write_system(folder, session.dataset.shared_system)


def read_weights(session: Session, folder: Path) -> None:
    """Load what `write_weights` wrote into the model. Raises ModelError if the base has changed."""
    if not session.recipe.adapter.facts.frozen_base:
        for file in folder.glob("*.safetensors"):  # tied weights are saved once
            session.model.load_state_dict(checkpoint.load_tensors(file), strict=False)
        return
    recorded = BaseIdentity.read(folder) or session.base_identity
    if (difference := recorded.difference(session.base_identity)) is not None:
        remedy = "Restore the base"
        if EXPERTS_IN in difference and EXPERTS_IN not in (recorded.quantization or ""):
            remedy = (
                "An earlier qlora began it, which recorded no experts in 4 bits: continue with that version"
            )
        raise ModelError(
            f"{folder.parent}: the base differs from that of this checkpoint in {difference}, so the run cannot "
            f"be resumed exactly. {remedy}, or start again with --fresh"
        )
    load_adapter(session.model, folder, any_base=True)
