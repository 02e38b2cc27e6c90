"""The command line as a user meets it."""

from tests.support.world import world as world
