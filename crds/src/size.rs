//! The two sizes a function can ask for (docs/rules.md, Sizes).

string_enum! {
    /// Size of a lease: how much of one card it holds.
    GpuSize default Large {
        /// Half a card, unless the pool maps it to a whole one. Weight 1.
        Large = "large",
        /// A whole card. Weight 2.
        Xlarge = "xlarge",
    }
}
