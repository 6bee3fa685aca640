"""`qlora generate`: answer one prompt with a fine-tuned model."""

from typing import Annotated

import typer

from qlora.cli.arguments import IMPORTS, AnyBase, Device, System, TrustRemoteCode, show_device, startup_for


def generate(
    adapter: Annotated[
        str, typer.Argument(metavar="RUN_OR_ADAPTER", help="Folder of a run or of an adapter.")
    ],
    prompt: Annotated[str, typer.Option("--prompt", help="The prompt; `-` reads it from standard input.")],
    base_only: Annotated[bool, typer.Option("--base", help="Use the base without the adapter.")] = False,
    system: System = None,
    any_base: AnyBase = False,
    trust_remote_code: TrustRemoteCode = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum length of the answer in tokens.")] = 128,
    device: Device = "auto",
) -> None:
    """Answer one prompt with a fine-tuned model.

    The same model and prompt always give the same answer (greedy decoding).
    `qlora chat` answers more than one question.
    The system prompt is the one that all training rows share, if they share one.

    [bold]qlora generate runs/quickstart --prompt "Send two red lamps to Anna."[/bold]
    """
    import sys

    text = sys.stdin.read() if prompt == "-" else prompt
    startup = startup_for()
    with startup.stage(IMPORTS):
        from qlora.data.prompts import NO_SYSTEM
        from qlora.inference.generate import answer
        from qlora.inference.load import load_trained
    show_device(startup, device)
    with startup.stage("loading the base" if base_only else "loading base and adapter"):
        trained = load_trained(
            adapter,
            device=device,
            with_adapter=not base_only,
            any_base=any_base,
            trust_remote_code=trust_remote_code,
        )
    prompts = trained.prompts
    ids = prompts.encode(text, system=system)
    if system is None and (described := prompts.describe_system()) != NO_SYSTEM:
        print(described, file=sys.stderr)
    positions = getattr(trained.model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and len(ids) > positions:
        lengths = f"the prompt has {len(ids):,} tokens, and the model {positions:,} positions"
        print(f"{lengths}; do not rely on the answer", file=sys.stderr)
    print(answer(trained.model, trained.tokenizer, ids, max_new_tokens, stop_ids=prompts.stop_ids))
