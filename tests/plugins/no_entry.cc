// A shared library that is no plug-in.
extern "C" __attribute__((visibility("default"))) int fathom_something_else() {
  return 0;
}
