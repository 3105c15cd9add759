//! What a health monitor reads: memory errors, remapped rows, temperature, power, clocks, field values.
#![allow(non_snake_case, reason = "the names are NVML's")]

use nvml_wrapper_sys::bindings::{field_id::*, *};

use super::{
    argument::{Device, Out, OutArray},
    code, exported,
    process_lists::microseconds_since_1970,
};
use crate::{Card, RecoveryAction, library::Answer};

/// An H200's clocks in MHz when it works: graphics, multiprocessors, memory, video.
const CLOCKS_MHZ: [u32; 4] = [1980, 1980, 3201, 1545];
/// More fields than NVML has; a caller that asks for more passed a wrong count.
const FIELDS_MAX: i32 = 1024;
// NVML's memory error types, counters and memory locations.
const CORRECTED: u32 = nvmlMemoryErrorType_enum_NVML_MEMORY_ERROR_TYPE_CORRECTED;
const UNCORRECTED: u32 = nvmlMemoryErrorType_enum_NVML_MEMORY_ERROR_TYPE_UNCORRECTED;
const VOLATILE: u32 = nvmlEccCounterType_enum_NVML_VOLATILE_ECC;
const AGGREGATE: u32 = nvmlEccCounterType_enum_NVML_AGGREGATE_ECC;
const DEVICE_MEMORY: u32 = nvmlMemoryLocation_enum_NVML_MEMORY_LOCATION_DRAM;
const SRAM: u32 = nvmlMemoryLocation_enum_NVML_MEMORY_LOCATION_SRAM;

exported! {
    fn nvmlDeviceGetEccMode(
        device: Device, current: Out<nvmlEnableState_t>, pending: Out<nvmlEnableState_t>
    ) {
        let enabled = u32::from(device.card()?.ecc.enabled);
        current.put(enabled)?;
        pending.put(enabled)
    }

    fn nvmlDeviceGetTotalEccErrors(device: Device, kind: u32, counter: u32, errors: Out<u64>) {
        errors.put(device.card()?.ecc_errors(kind, counter)?)
    }

    /// All errors are in the device's memory; caches and registers have none.
    fn nvmlDeviceGetMemoryErrorCounter(
        device: Device, kind: u32, counter: u32, location: nvmlMemoryLocation_t, errors: Out<u64>
    ) {
        let total = device.card()?.ecc_errors(kind, counter)?;
        match location {
            DEVICE_MEMORY => errors.put(total),
            SRAM => errors.put(0),
            _ => Err(code::NOT_SUPPORTED),
        }
    }

    fn nvmlDeviceGetRemappedRows(
        device: Device, correctable: Out<u32>, uncorrectable: Out<u32>, pending: Out<u32>, failure: Out<u32>
    ) {
        let rows = &device.whole_card()?.remapped_rows;
        correctable.put(rows.correctable)?;
        uncorrectable.put(rows.uncorrectable)?;
        pending.put(rows.pending.into())?;
        failure.put(rows.failure.into())
    }

    fn nvmlDeviceGetTemperature(device: Device, sensor: nvmlTemperatureSensors_t, celsius: Out<u32>) {
        if sensor != nvmlTemperatureSensors_enum_NVML_TEMPERATURE_GPU {
            return Err(code::INVALID_ARGUMENT);
        }
        celsius.put(device.whole_card()?.temperature_celsius)
    }

    fn nvmlDeviceGetPowerUsage(device: Device, milliwatts: Out<u32>) {
        milliwatts.put(device.whole_card()?.power_usage_milliwatts)
    }

    fn nvmlDeviceGetEnforcedPowerLimit(device: Device, milliwatts: Out<u32>) {
        milliwatts.put(device.whole_card()?.power_limit_milliwatts)
    }

    fn nvmlDeviceGetPowerManagementLimit(device: Device, milliwatts: Out<u32>) {
        milliwatts.put(device.whole_card()?.power_limit_milliwatts)
    }

    fn nvmlDeviceGetPerformanceState(device: Device, state: Out<nvmlPstates_t>) {
        device.whole_card()?;
        state.put(nvmlPStates_enum_NVML_PSTATE_0)
    }

    fn nvmlDeviceGetClockInfo(device: Device, clock: nvmlClockType_t, megahertz: Out<u32>) {
        device.whole_card()?;
        megahertz.put(*CLOCKS_MHZ.get(clock as usize).ok_or(code::INVALID_ARGUMENT)?)
    }

    fn nvmlDeviceGetMaxClockInfo(device: Device, clock: nvmlClockType_t, megahertz: Out<u32>) {
        device.whole_card()?;
        megahertz.put(*CLOCKS_MHZ.get(clock as usize).ok_or(code::INVALID_ARGUMENT)?)
    }

    /// Each field answers for itself: one that the stand-in does not know says so and leaves the others alone.
    fn nvmlDeviceGetFieldValues(device: Device, count: i32, values: OutArray<nvmlFieldValue_t>) {
        let card = device.whole_card()?;
        if !(1..=FIELDS_MAX).contains(&count) {
            return Err(code::INVALID_ARGUMENT);
        }
        let mut values = values;
        // SAFETY: by NVML's documentation the caller passes `count` values with their field ids filled in.
        for value in unsafe { values.values(count as usize) }? {
            value.timestamp = microseconds_since_1970() as i64;
            value.latencyUsec = 0;
            (value.nvmlReturn, value.valueType, value.value) = match card.field(value.fieldId) {
                Ok(Field::Number(number)) => {
                    (code::SUCCESS, nvmlValueType_enum_NVML_VALUE_TYPE_UNSIGNED_INT, nvmlValue_t { uiVal: number })
                }
                Ok(Field::Count(count)) => {
                    let kind = nvmlValueType_enum_NVML_VALUE_TYPE_UNSIGNED_LONG_LONG;
                    (code::SUCCESS, kind, nvmlValue_t { ullVal: count })
                }
                Err(code) => (code, nvmlValueType_enum_NVML_VALUE_TYPE_UNSIGNED_INT, nvmlValue_t { uiVal: 0 }),
            };
        }
        Ok(())
    }
}

enum Field {
    Number(u32),
    Count(u64),
}

impl Card {
    /// The counter for a `nvmlMemoryErrorType_t` and a `nvmlEccCounterType_t`.
    fn ecc_errors(&self, kind: u32, counter: u32) -> Answer<u64> {
        let ecc = &self.ecc;
        if !ecc.enabled {
            return Err(code::NOT_SUPPORTED);
        }
        match (counter, kind) {
            (VOLATILE, CORRECTED) => Ok(ecc.volatile_corrected),
            (VOLATILE, UNCORRECTED) => Ok(ecc.volatile_uncorrected),
            (AGGREGATE, CORRECTED) => Ok(ecc.aggregate_corrected),
            (AGGREGATE, UNCORRECTED) => Ok(ecc.aggregate_uncorrected),
            _ => Err(code::INVALID_ARGUMENT),
        }
    }

    fn field(&self, id: u32) -> Answer<Field> {
        Ok(match id {
            NVML_FI_DEV_ECC_CURRENT | NVML_FI_DEV_ECC_PENDING => Field::Number(self.ecc.enabled.into()),
            NVML_FI_DEV_ECC_SBE_VOL_TOTAL => Field::Count(self.ecc_errors(CORRECTED, VOLATILE)?),
            NVML_FI_DEV_ECC_DBE_VOL_TOTAL => Field::Count(self.ecc_errors(UNCORRECTED, VOLATILE)?),
            NVML_FI_DEV_ECC_SBE_AGG_TOTAL => Field::Count(self.ecc_errors(CORRECTED, AGGREGATE)?),
            NVML_FI_DEV_ECC_DBE_AGG_TOTAL => Field::Count(self.ecc_errors(UNCORRECTED, AGGREGATE)?),
            NVML_FI_DEV_REMAPPED_COR => Field::Number(self.remapped_rows.correctable),
            NVML_FI_DEV_REMAPPED_UNC => Field::Number(self.remapped_rows.uncorrectable),
            NVML_FI_DEV_REMAPPED_PENDING => Field::Number(self.remapped_rows.pending.into()),
            NVML_FI_DEV_REMAPPED_FAILURE => Field::Number(self.remapped_rows.failure.into()),
            NVML_FI_DEV_POWER_INSTANT | NVML_FI_DEV_POWER_AVERAGE => Field::Number(self.power_usage_milliwatts),
            NVML_FI_DEV_GET_GPU_RECOVERY_ACTION => Field::Number(self.recovery_action.number()),
            _ => return Err(code::NOT_SUPPORTED),
        })
    }
}

impl RecoveryAction {
    fn number(self) -> u32 {
        match self {
            Self::None => nvmlDeviceGpuRecoveryAction_s_NVML_GPU_RECOVERY_ACTION_NONE,
            Self::GpuReset => nvmlDeviceGpuRecoveryAction_s_NVML_GPU_RECOVERY_ACTION_GPU_RESET,
            Self::NodeReboot => nvmlDeviceGpuRecoveryAction_s_NVML_GPU_RECOVERY_ACTION_NODE_REBOOT,
            Self::DrainP2p => nvmlDeviceGpuRecoveryAction_s_NVML_GPU_RECOVERY_ACTION_DRAIN_P2P,
            Self::DrainAndReset => nvmlDeviceGpuRecoveryAction_s_NVML_GPU_RECOVERY_ACTION_DRAIN_AND_RESET,
        }
    }
}
