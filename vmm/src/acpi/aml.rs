//! AML that devices contribute.

use acpi_tables::{Aml, AmlSink};

/// AML that is already encoded.
pub struct Raw<'a>(pub &'a [u8]);

impl Aml for Raw<'_> {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(self.0);
    }
}
