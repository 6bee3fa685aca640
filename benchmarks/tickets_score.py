"""How many held-out tickets a quickstart run answers right, to the letter.

python benchmarks/tickets_score.py runs/quickstart
"""

import argparse

from qlora.bundled.tickets import score
from qlora.data import load_dataset
from qlora.inference.generate import answer
from qlora.inference.load import load_trained


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("run")
    parser.add_argument("--base", action="store_true", help="without the adapter")
    arguments = parser.parse_args()
    trained = load_trained(arguments.run, with_adapter=not arguments.base)
    dataset = load_dataset(trained.recipe.data, trained.tokenizer, trained.recipe.training.seed)
    scores = [
        score(prompt.reference, answer(trained.model, trained.tokenizer, prompt.input_ids, max_new_tokens=24))
        for prompt in dataset.prompts
    ]
    whole = sum(value == 1 for value in scores)
    print(f"{whole} of {len(scores)} tickets right, {sum(scores) / len(scores):.1%} of their fields")


if __name__ == "__main__":
    main()
