"""The canonical model every architecture is read into and written from: Llama's layout, plus named traits."""
