"""The command line, and what only it needs; `import fastvae` never imports this package."""
