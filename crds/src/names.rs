//! Names that more than one part must spell alike.

/// API group of every kind.
pub const GROUP: &str = "spaceport.dev";
/// API version of every kind.
pub const VERSION: &str = "v1alpha1";
/// `apiVersion` of every kind.
pub const API_VERSION: &str = "spaceport.dev/v1alpha1";
/// Category of every kind: `kubectl get spaceport -A`.
pub const CATEGORY: &str = "spaceport";

/// Extended resource of a time-shared Space pod (N4).
pub const SEAT_RESOURCE: &str = "spaceport.dev/seat";
/// Extended resource of a dedicated half card (N4).
pub const LARGE_RESOURCE: &str = "spaceport.dev/large";
/// Extended resource of a dedicated whole card (N4).
pub const XLARGE_RESOURCE: &str = "spaceport.dev/xlarge";

/// The GPUAccount that holds the epoch of the present term (L6).
pub const TERM_PAGE: &str = "spaceport-term";
/// Name prefix of guests' accounts, one for each address prefix (L1, L4).
pub const GUEST_PAGE_PREFIX: &str = "guest-";
/// Name prefix of the account of a Space's own calls, followed by the Space's uid (L4).
pub const SPACE_PAGE_PREFIX: &str = "space-";
/// Name prefix of pages that belong to the system (L4).
pub const SYSTEM_PAGE_PREFIX: &str = "spaceport-";

/// Finalizer on a GPUAccount: it goes when nothing is open, the outbox is empty and the window has ended (L4).
pub const LEDGER_FINALIZER: &str = "spaceport.dev/ledger";
/// Annotation that lets an admin delete an account with open holds (L4); its value is the reason.
pub const BREAK_GLASS_ANNOTATION: &str = "spaceport.dev/break-glass";

/// Label with the name of the Space an object belongs to.
pub const SPACE_LABEL: &str = "spaceport.dev/space";
/// Label on a GPULease with the name of the account it is charged to.
pub const ACCOUNT_LABEL: &str = "spaceport.dev/account";
/// Label on a GPULease with its ledger id, a ULID in lower case.
pub const LEASE_LABEL: &str = "spaceport.dev/lease";
