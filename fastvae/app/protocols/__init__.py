"""Published figures, a file each; see fastvae.app.run.protocol."""
