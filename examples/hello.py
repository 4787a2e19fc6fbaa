"""Continues a text:  python3 hello.py examples/models/trained.Q8_0.gguf "Once upon a time"
The library: $FATHOM_LIBRARY, or a third argument, or where the system's loader finds it."""
import ctypes as c, os, sys

model_path, text = sys.argv[1], sys.argv[2].encode()
lib = c.CDLL(sys.argv[3] if len(sys.argv) > 3 else os.environ.get("FATHOM_LIBRARY", "libfathom.so"))
OnToken = c.CFUNCTYPE(c.c_int32, c.c_void_p, c.c_int32, c.POINTER(c.c_char), c.c_uint64, c.c_uint64)

class Error(c.Structure):  # fathom_error
    _fields_ = [("struct_size", c.c_uint32), ("code", c.c_int32), ("sys_errno", c.c_int32), ("device", c.c_int32),
                ("needed", c.c_uint64), ("available", c.c_uint64), ("offset", c.c_uint64),
                ("key", c.c_char * 64), ("message", c.c_char * 408)]

class Generate(c.Structure):  # fathom_generate_params
    _fields_ = [("struct_size", c.c_uint32), ("flags", c.c_uint32), ("max_new_tokens", c.c_uint64),
                ("on_token", OnToken), ("user", c.c_void_p), ("stop_ids", c.c_void_p), ("n_stop_ids", c.c_uint64),
                ("stop_strings", c.c_void_p), ("n_stop_strings", c.c_uint64)]

def call(name, *arguments):
    error = Error(struct_size=c.sizeof(Error))
    if getattr(lib, "fathom_" + name)(*arguments, c.byref(error)) != 0:
        sys.exit(f"fathom_{name}: {error.message.decode()}")

@OnToken
def show(user, token, utf8, length, position):
    sys.stdout.buffer.write(utf8[:length])
    return 0  # anything else would stop

engine, plan, model, tokenizer, session = (c.c_void_p() for _ in range(5))
ids, n = (c.c_int32 * 4096)(), c.c_uint64()
call("engine_create", None, None, c.byref(engine))
call("plan_create", engine, os.fsencode(model_path), None, c.byref(plan))
call("model_load", engine, plan, None, c.byref(model))
call("tokenizer_of", model, c.byref(tokenizer))
call("tokenize", tokenizer, text, c.c_uint64(len(text)), 1, ids, c.c_uint64(len(ids)), c.byref(n))  # 1: ADD_BOS
call("session_create", model, None, c.byref(session))
call("session_prefill", session, ids, n, None)
call("session_generate", session, None, c.byref(Generate(struct_size=c.sizeof(Generate), max_new_tokens=64, on_token=show)), None, None)
print()
