"""`qlora eval`: held-out loss of a fine-tuned model or of its base."""

import json
from typing import Annotated

import typer

from qlora.cli.arguments import IMPORTS, AnyBase, Device, Json, TrustRemoteCode, show_device, startup_for


def evaluate(
    adapter: Annotated[
        str, typer.Argument(metavar="RUN_OR_ADAPTER", help="Folder of a run or of an adapter.")
    ],
    base_only: Annotated[bool, typer.Option("--base", help="Evaluate the base without the adapter.")] = False,
    any_base: AnyBase = False,
    trust_remote_code: TrustRemoteCode = False,
    device: Device = "auto",
    json_output: Json = False,
) -> None:
    """Compute the loss on the held-out rows of a run's recipe.

    The loss is the mean in nats per supervised token.

    [bold]qlora eval runs/quickstart[/bold]
    [bold]qlora eval runs/quickstart --base[/bold]
    """
    startup = startup_for(json_output=json_output)
    with startup.stage(IMPORTS):
        from qlora.inference.load import held_out_loss, load_trained
        from qlora.kernels import compiled_for
    show_device(startup, device)
    with startup.stage("loading base and adapter"):
        trained = load_trained(
            adapter,
            device=device,
            with_adapter=not base_only,
            any_base=any_base,
            trust_remote_code=trust_remote_code,
        )
    compiling = "compiling kernels, " if compiled_for(trained.model.device) else ""
    with startup.stage(f"{compiling}computing the loss on the held-out rows"):
        loss, tokens = held_out_loss(trained)
    if json_output:
        print(json.dumps({"eval_loss": loss, "eval_tokens": tokens}))
    else:
        print(f"held-out loss {loss:.4f} nats per token over {tokens} supervised tokens")
