"""Tables made from records, put into README.md and the pages of docs/: `python -m tools.tables [--check]`.

A page marks where table NAME goes with two HTML comments, `table: NAME` and `/table`; what stands between them belongs
to this tool.  A new table is a function from the records to Markdown, registered under its name in one of the files
`*_tables.py`.  A table knows nothing of the page that it stands on, so it has no relative links.
"""
