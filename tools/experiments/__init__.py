"""Questions that were asked once, each a file that can be run again."""
