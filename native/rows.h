/* Hidden states on the wire; see homeinfer/_native.pyi. */
#ifndef HOMEINFER_ROWS_H
#define HOMEINFER_ROWS_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

PyObject *rows_pack(PyObject *module, PyObject *args);
PyObject *rows_unpack(PyObject *module, PyObject *args);

#endif
