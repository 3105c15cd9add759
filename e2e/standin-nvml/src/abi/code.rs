//! NVML's return codes under shorter names, and their texts.

use std::ffi::CStr;

use nvml_wrapper_sys::bindings::*;

/// Names each code and gives its text, so that none has a name without a text.
macro_rules! codes {
    ($($name:ident = $code:ident, $text:literal;)*) => {
        $(#[allow(dead_code, reason = "the list is NVML's, whole, for its texts")]
        pub const $name: nvmlReturn_t = $code;)*

        /// What `nvmlErrorString` says.
        pub fn text(code: nvmlReturn_t) -> &'static CStr {
            match code {
                $($name => $text,)*
                _ => c"no NVML return code",
            }
        }
    };
}

codes! {
    SUCCESS = nvmlReturn_enum_NVML_SUCCESS, c"success";
    UNINITIALIZED = nvmlReturn_enum_NVML_ERROR_UNINITIALIZED, c"the library is not initialised";
    INVALID_ARGUMENT = nvmlReturn_enum_NVML_ERROR_INVALID_ARGUMENT, c"invalid argument";
    NOT_SUPPORTED = nvmlReturn_enum_NVML_ERROR_NOT_SUPPORTED, c"not supported";
    NO_PERMISSION = nvmlReturn_enum_NVML_ERROR_NO_PERMISSION, c"no permission";
    ALREADY_INITIALIZED = nvmlReturn_enum_NVML_ERROR_ALREADY_INITIALIZED, c"already initialised";
    NOT_FOUND = nvmlReturn_enum_NVML_ERROR_NOT_FOUND, c"not found";
    INSUFFICIENT_SIZE = nvmlReturn_enum_NVML_ERROR_INSUFFICIENT_SIZE, c"the buffer is too small";
    INSUFFICIENT_POWER = nvmlReturn_enum_NVML_ERROR_INSUFFICIENT_POWER, c"external power is missing";
    DRIVER_NOT_LOADED = nvmlReturn_enum_NVML_ERROR_DRIVER_NOT_LOADED, c"the driver is not loaded";
    TIMEOUT = nvmlReturn_enum_NVML_ERROR_TIMEOUT, c"timeout";
    IRQ_ISSUE = nvmlReturn_enum_NVML_ERROR_IRQ_ISSUE, c"interrupt trouble";
    LIBRARY_NOT_FOUND = nvmlReturn_enum_NVML_ERROR_LIBRARY_NOT_FOUND, c"a library is missing";
    FUNCTION_NOT_FOUND = nvmlReturn_enum_NVML_ERROR_FUNCTION_NOT_FOUND, c"the driver has no such function";
    CORRUPTED_INFOROM = nvmlReturn_enum_NVML_ERROR_CORRUPTED_INFOROM, c"the infoROM is corrupted";
    GPU_IS_LOST = nvmlReturn_enum_NVML_ERROR_GPU_IS_LOST, c"the GPU is lost";
    RESET_REQUIRED = nvmlReturn_enum_NVML_ERROR_RESET_REQUIRED, c"the GPU needs a reset";
    OPERATING_SYSTEM = nvmlReturn_enum_NVML_ERROR_OPERATING_SYSTEM, c"blocked by the operating system";
    LIB_RM_VERSION_MISMATCH = nvmlReturn_enum_NVML_ERROR_LIB_RM_VERSION_MISMATCH, c"driver and library versions differ";
    IN_USE = nvmlReturn_enum_NVML_ERROR_IN_USE, c"in use";
    MEMORY = nvmlReturn_enum_NVML_ERROR_MEMORY, c"out of memory";
    NO_DATA = nvmlReturn_enum_NVML_ERROR_NO_DATA, c"no data";
    VGPU_ECC_NOT_SUPPORTED = nvmlReturn_enum_NVML_ERROR_VGPU_ECC_NOT_SUPPORTED, c"not possible with ECC on";
    INSUFFICIENT_RESOURCES = nvmlReturn_enum_NVML_ERROR_INSUFFICIENT_RESOURCES, c"not enough left of the GPU";
    FREQ_NOT_SUPPORTED = nvmlReturn_enum_NVML_ERROR_FREQ_NOT_SUPPORTED, c"the frequency is not supported";
    ARGUMENT_VERSION_MISMATCH = nvmlReturn_enum_NVML_ERROR_ARGUMENT_VERSION_MISMATCH, c"unknown structure version";
    DEPRECATED = nvmlReturn_enum_NVML_ERROR_DEPRECATED, c"no longer supported";
    NOT_READY = nvmlReturn_enum_NVML_ERROR_NOT_READY, c"not ready";
    GPU_NOT_FOUND = nvmlReturn_enum_NVML_ERROR_GPU_NOT_FOUND, c"there is no GPU";
    INVALID_STATE = nvmlReturn_enum_NVML_ERROR_INVALID_STATE, c"not possible in this state";
    UNKNOWN = nvmlReturn_enum_NVML_ERROR_UNKNOWN, c"unknown error";
}
