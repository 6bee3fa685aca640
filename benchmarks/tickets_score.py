"""Print how many held-out tickets a quickstart run answers exactly right.

python benchmarks/tickets_score.py runs/quickstart
"""

import argparse

from qlora.bundled.tickets import score
from qlora.data import load_dataset
from qlora.inference.generate import answer
from qlora.inference.load import load_trained


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("run", help="folder of the run")
    parser.add_argument("--base", action="store_true", help="score the base model, without the adapter")
    arguments = parser.parse_args()
    trained = load_trained(arguments.run, with_adapter=not arguments.base)
    dataset = load_dataset(trained.recipe.data, trained.tokenizer, trained.recipe.training.seed)
    scores = [
        score(prompt.reference, answer(trained.model, trained.tokenizer, prompt.input_ids, max_new_tokens=24))
        for prompt in dataset.prompts
    ]
    right = sum(value == 1 for value in scores)
    print(f"{right} of {len(scores)} tickets right, {sum(scores) / len(scores):.1%} of their fields")


if __name__ == "__main__":
    main()
