"""Icarus Verilog on one text, which comes on stdin: `icarus.py WHAT IVERILOG VVP [TOP]`.

expand    what its preprocessor makes of the text, on stdout
simulate  compiles the text for the top module and simulates it, as VerilogEval does. Both tools' words, on stdout and
          stderr; exit status 97 if it does not compile, else the simulation's
"""

import os
import sys

import enter

NOT_COMPILED = 97
COMPILE = ("-Wall", "-Winfloop", "-Wno-timescale", "-g2012")


def main():
    what, iverilog, vvp, *top = sys.argv[1:]
    with open("task.sv", "wb") as file:
        file.write(sys.stdin.buffer.read())
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if what == "expand":
        os.execv(iverilog, [iverilog, "-E", "-g2012", "-o", "-", "task.sv"])
    compiler = os.posix_spawn(iverilog, [iverilog, *COMPILE, "-s", *top, "-o", "task.vvp", "task.sv"], {})
    if os.waitpid(compiler, 0)[1] != 0:
        sys.exit(NOT_COMPILED)
    enter.limit("RLIMIT_NPROC", enter.THREADS if enter.forbid_processes() else 0)
    os.execv(vvp, [vvp, "-n", "task.vvp"])


main()
