"""`fastvae plan`: what a job would cost, from rates that were recorded."""
