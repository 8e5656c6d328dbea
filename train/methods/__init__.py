"""One file per training method; the file name is the method's name. Each defines `Config` with a `build`."""
