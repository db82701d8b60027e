"""Runs a Python program that is judged as a whole. Executed inside the sandbox, under any Python from 3.9; imported by nobody.

`python -s start.py main.py`: main.py runs as __main__, with the names that LiveCodeBench imports before a program (those that it
uses and does not define), the depth of recursion that the problem allows, and /dev/stdin, for which the sandbox has no /proc.
A line before this file sets R1_NAMES (name -> the module that gives it, or that it is) and R1_RECURSION_DEPTH.
"""

import sys  # for the last line: the function clears this namespace, which becomes the program's


def r1_start(path, names, recursion_depth):
    import _thread
    import builtins
    import sys

    with open(path, "rb") as file:
        source = file.read()
    namespace = sys.modules["__main__"].__dict__
    kept = {"__name__": "__main__", "__builtins__": builtins, "__file__": path, "__doc__": None, "__package__": None}
    namespace.clear()
    namespace.update(kept)
    sys.argv[:] = [path]
    sys.path[0] = path.rpartition("/")[0]
    code = compile(source, path, "exec", dont_inherit=True)

    def free_names():
        import _symtable as tables

        found, left = set(), [tables.symtable(source, path, "exec")]
        while left:
            table = left.pop()
            left += table.children
            for name, flags in table.symbols.items():
                if flags >> tables.SCOPE_OFF & tables.SCOPE_MASK in (tables.GLOBAL_IMPLICIT, tables.GLOBAL_EXPLICIT):
                    found.add(name)
        return found

    for name in free_names() & set(names):
        module = __import__(names[name])
        value = module if name == names[name] else getattr(module, name, None)
        if value is not None:
            namespace[name] = value
    if b"/dev/stdin" in source or b"/proc/self/fd/0" in source:
        import io
        import os

        plain_open = open

        def open_stdin(file, *positional, **named):
            return plain_open(os.dup(0) if str(file) in ("/dev/stdin", "/proc/self/fd/0") else file, *positional, **named)

        builtins.open = io.open = open_stdin
    sys.setrecursionlimit(recursion_depth)
    _thread.stack_size(8 << 20)  # Linux's default; else each has the program's, and the memory limit, of address space, holds few
    exec(code, namespace)  # noqa: S102


if __name__ == "__main__":
    r1_start(sys.argv[1], R1_NAMES, R1_RECURSION_DEPTH)  # noqa: F821 - the line before sets them
