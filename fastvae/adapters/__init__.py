"""fastvae inside other libraries.  Each module needs its library: `fastvae.adapters.scvi`, `.pythae`, `.pyro`."""
