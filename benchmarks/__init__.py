"""Programs that measure; run from the source tree, no part of the installed package."""
