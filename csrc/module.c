/*
 * kasmina_ext._C: importing it registers the operators with torch. It has no functions, only facts about the build.
 */
#include <Python.h>

#include "device.h"
#include "ops/ops.h"
#include "schema.h"
#include "torch_abi.h"

static const struct {
    const char *name, *schema;
    void (*boxed)(StableIValue *, uint64_t, uint64_t);
} operators[] = {
    {"chunked_forward", KASMINA_SCHEMA_CHUNKED_FORWARD, kasmina_chunked_forward},
    {"chunked_backward", KASMINA_SCHEMA_CHUNKED_BACKWARD, kasmina_chunked_backward},
    {"telemetry_update", KASMINA_SCHEMA_TELEMETRY_UPDATE, kasmina_telemetry_update},
    {"telemetry_reduce", KASMINA_SCHEMA_TELEMETRY_REDUCE, kasmina_telemetry_reduce},
    {"telemetry_merge", KASMINA_SCHEMA_TELEMETRY_MERGE, kasmina_telemetry_merge},
    {"state_update", KASMINA_SCHEMA_STATE_UPDATE, kasmina_state_update},
    {"lifecycle_step", KASMINA_SCHEMA_LIFECYCLE_STEP, kasmina_lifecycle_step},
    {"reconstruction_loss", KASMINA_SCHEMA_RECONSTRUCTION_LOSS, kasmina_reconstruction_loss},
    {"reconstruction_loss_backward", KASMINA_SCHEMA_RECONSTRUCTION_LOSS_BACKWARD, kasmina_reconstruction_loss_backward},
    {"pair_moments", KASMINA_SCHEMA_PAIR_MOMENTS, kasmina_pair_moments},
};
enum { NUM_OPERATORS = sizeof operators / sizeof *operators };

/* The registrations live as long as these objects: for ever, once all are made. */
enum { DEFINITIONS, CPU, CUDA, NUM_LIBRARIES };
static TorchLibraryHandle libraries[NUM_LIBRARIES];

static const char *cuda_registration = "";

static bool implement(TorchLibraryHandle *library, const char *key)
{
    if (aoti_torch_library_init_impl("kasmina", key, __FILE__, __LINE__, library)) return false;
    for (int i = 0; i < NUM_OPERATORS; ++i)
        if (torch_library_impl(*library, operators[i].name, operators[i].boxed, KASMINA_TORCH_BUILD_VERSION))
            return false;
    return true;
}

static bool register_operators(void)
{
    if (aoti_torch_library_init_def("kasmina", __FILE__, __LINE__, &libraries[DEFINITIONS])) return false;
    for (int i = 0; i < NUM_OPERATORS; ++i)
        if (aoti_torch_library_def(libraries[DEFINITIONS], operators[i].schema)) return false;
    if (!implement(&libraries[CPU], "CPU")) return false;
    return !kasmina_device_find_cuda(&cuda_registration) || implement(&libraries[CUDA], "CUDA");
}

/* Undo a half-made registration, so that Python can define the operators instead. */
static void unregister_operators(void)
{
    for (int i = NUM_LIBRARIES - 1; i >= 0; --i) {
        if (libraries[i]) aoti_torch_delete_library_object(libraries[i]);
        libraries[i] = NULL;
    }
}

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "kasmina_ext._C",
    .m_doc = "The compiled operators of kasmina_ext; importing it registers them with torch.",
    .m_size = -1,
};

__attribute__((visibility("default"))) PyMODINIT_FUNC PyInit__C(void)
{
    if (!libraries[DEFINITIONS] && !register_operators()) {
        unregister_operators();
        PyErr_SetString(PyExc_ImportError, "torch refused the registration of the kasmina operators");
        return NULL;
    }
    PyObject *module = PyModule_Create(&definition);
    if (module && (PyModule_AddStringConstant(module, "version", KASMINA_VERSION) ||
                   PyModule_AddStringConstant(module, "compiler", KASMINA_BUILD_COMPILER) ||
                   PyModule_AddStringConstant(module, "cuda", KASMINA_BUILD_CUDA) ||
                   PyModule_AddStringConstant(module, "cuda_archs", KASMINA_BUILD_CUDA_ARCHS) ||
                   PyModule_AddStringConstant(module, "cuda_reason", KASMINA_BUILD_CUDA_REASON) ||
                   PyModule_AddIntConstant(module, "cuda_registered", libraries[CUDA] != NULL) ||
                   PyModule_AddStringConstant(module, "cuda_registration", cuda_registration))) {
        Py_DECREF(module);
        return NULL;
    }
    return module;
}
