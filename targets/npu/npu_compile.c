/* npu_compile MODEL.xml OUT.blob [KEY=VALUE ...]: compiles an OpenVINO IR for the Intel NPU and writes the blob.
 *
 * OpenVINO's Windows wheel has the NPU compiler, the Linux wheel has not. So this program is built with MinGW, put
 * beside the wheel's DLLs and run by Wine (targets/npu/set_up.py does all of that). It says what it does on stdout, in
 * lines that begin with "npu_compile: "; every other line there is the compiler's own log.
 *
 * Exit codes: 0 the blob is written, 2 wrong arguments, 3 OpenVINO cannot be started, 4 the model cannot be read,
 * 5 the plugin or the compiler refused the model, 6 the blob cannot be written.
 */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "openvino/c/openvino.h"

enum { MAX_PROPERTIES = 64 };

static void fail(int code, const char* stage, ov_status_e status) {
    const char* message = ov_get_last_err_msg();
    printf("npu_compile: failed %s: %s\n", stage, ov_get_error_info(status));
    printf("npu_compile: reason begins\n%s\nnpu_compile: reason ends\n", message != NULL ? message : "");
    fflush(stdout);
    exit(code);
}

int main(int count, char** arguments) {
    ov_property_t properties[MAX_PROPERTIES];
    ov_version_t version;
    ov_core_t* core = NULL;
    ov_model_t* model = NULL;
    ov_compiled_model_t* compiled = NULL;
    ov_status_e status;
    size_t used = 0;
    int i;

    setvbuf(stdout, NULL, _IONBF, 0); /* a compiler that dies takes no log lines with it */
    if (count < 3 || count - 3 > MAX_PROPERTIES) {
        fprintf(stderr, "usage: npu_compile MODEL.xml OUT.blob [KEY=VALUE ...]\n");
        return 2;
    }
    for (i = 3; i < count; i++) {
        char* equals = strchr(arguments[i], '=');
        if (equals == NULL) {
            fprintf(stderr, "npu_compile: %s is not KEY=VALUE\n", arguments[i]);
            return 2;
        }
        *equals = '\0';
        properties[used].key = arguments[i];
        properties[used].value = equals + 1;
        used++;
    }
    if (ov_get_openvino_version(&version) == OK) {
        printf("npu_compile: openvino %s\n", version.buildNumber);
        ov_version_free(&version);
    }
    if ((status = ov_core_create(&core)) != OK) fail(3, "start", status);
    if ((status = ov_core_read_model(core, arguments[1], NULL, &model)) != OK) fail(4, "read", status);
    status = ov_core_compile_model_props(core, model, "NPU", used, properties, &compiled);
    if (status != OK) fail(5, "compile", status);
    printf("npu_compile: compiled\n");
    if ((status = ov_compiled_model_export_model(compiled, arguments[2])) != OK) fail(6, "export", status);
    printf("npu_compile: exported\n");
    fflush(stdout);
    _Exit(0); /* the blob is on the disk; unloading the plugin under Wine could only go wrong */
}
