"""`qlora check`: validate a recipe."""

from qlora.cli.arguments import Overrides, RecipeArgument


def check(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Check a recipe and print it with every default written out.

    Nothing is trained, downloaded or written.

    [bold]qlora check my.yaml optimizer.lr=1e-4[/bold]
    """
    from qlora.recipe import Recipe

    print(Recipe.load(recipe, overrides or []).to_yaml(), end="")
