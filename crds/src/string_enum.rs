//! One macro for every enum that is a string on the wire: the text, the list of all values and the explanation come
//! from one place, so that schema, code and reference page cannot disagree.

/// Declares an enum whose variants are strings in JSON, each with the doc comment that the reference page prints.
///
/// `default Variant` before the body gives the type a `Default`, which the schema then shows as the field's default.
macro_rules! string_enum {
    (
        $(#[doc = $doc:literal])+
        $name:ident default $default:ident { $($body:tt)+ }
    ) => {
        string_enum! { $(#[doc = $doc])+ $name { $($body)+ } }

        impl Default for $name {
            fn default() -> Self {
                Self::$default
            }
        }
    };
    (
        $(#[doc = $doc:literal])+
        $name:ident { $($(#[doc = $explained:literal])+ $variant:ident = $text:literal,)+ }
    ) => {
        $(#[doc = $doc])+
        #[derive(
            Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash,
            serde::Serialize, serde::Deserialize, schemars::JsonSchema,
        )]
        pub enum $name {
            $($(#[doc = $explained])+ #[serde(rename = $text)] $variant,)+
        }

        impl $name {
            /// Every value, in the order of declaration.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// The text on the wire.
            pub const fn as_str(self) -> &'static str {
                match self {
                    $(Self::$variant => $text,)+
                }
            }

            /// What the value means, as the reference page prints it.
            pub const fn explanation(self) -> &'static str {
                match self {
                    $(Self::$variant => concat!($($explained),+),)+
                }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                formatter.write_str(self.as_str())
            }
        }
    };
}
