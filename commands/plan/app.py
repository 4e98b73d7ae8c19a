"""`secondcast plan`."""

import typer

from secondcast.commands.plan.build import plan_build
from secondcast.commands.plan.evaluate import plan_evaluate
from secondcast.commands.plan.generate import plan_generate
from secondcast.commands.plan.recipe import plan_recipe
from secondcast.commands.plan.train import plan_train
from secondcast.commands.shell.flags import add_command

plan_app = typer.Typer(no_args_is_help=True, help="Estimate disk space, hours and memory in advance.")
add_command(plan_app, plan_build, "build")
add_command(plan_app, plan_train, "train")
add_command(plan_app, plan_generate, "generate")
add_command(plan_app, plan_evaluate, "evaluate")
add_command(plan_app, plan_recipe, "recipe")
