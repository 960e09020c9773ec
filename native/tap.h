/* The tap on a model's matrix products, see tap.c. */
#ifndef HOMEINFER_TAP_H
#define HOMEINFER_TAP_H

#include "capture.h"

PyObject *tap_new(PyObject *module, PyObject *args);
PyObject *tap_pointers(PyObject *module, PyObject *capsule);
PyObject *tap_begin(PyObject *module, PyObject *capsule);
PyObject *tap_state(PyObject *module, PyObject *capsule);
PyObject *tensor_fields(PyObject *module, PyObject *address);

#endif
