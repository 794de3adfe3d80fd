#!/bin/sh
# The kernel's classes, so that its start needs no compiler.
set -eu
cd /usr/share/stillbox/interpreter/java
javac --add-modules jdk.jshell -XDignore.symbol.file JavaKernel.java
