"""`fastvae score`: the files it reads, the file it writes block by block, and how it goes on after a stop."""
