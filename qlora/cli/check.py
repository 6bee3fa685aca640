"""`qlora check`: is the recipe right? Says so without training, downloading or writing anything."""

from qlora.cli.arguments import Overrides, RecipeArgument


def check(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Check a recipe and print it with every default written out."""
    from qlora.recipe import Recipe

    print(Recipe.load(recipe, overrides or []).to_yaml(), end="")
