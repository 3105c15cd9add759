//! Demand that is made up, in the shape of real demand for image generation (docs/figures, "Shape of the demand").
//!
//! - **Service**: log-normal, median 23 s, mean 28.7 s. Two numbers fix it; the quantiles p90 53, p95 69 and p99 106 come
//!   out within 3 %, p75 (33) within 10 %, p10 (13) 25 % too low: the real distribution is a little steeper below its
//!   median than a log-normal one.
//! - **Failures**: 1.5 %, log-normal with a median of 8 s. They declare what they would have needed.
//! - **Sizes**: 15 % ask for a whole card.
//! - **Arrivals**: a two-state Poisson process. The coefficient of variation of its inter-arrival times is 12, exactly,
//!   and its fast state is 80 times as fast as the mean. A two-state process with such a variation has next to nothing
//!   in its slow state (at most 1.4 % of all requests, whatever its other numbers), so 0.5 % of the mean rate is left
//!   there, and a burst has about 75 requests. "Peak minute 80 times the mean" is a number of days, with their quiet
//!   hours: it comes out of a week of this process at a mean load of 0.15. At a load of 1.2 the same process runs eight
//!   times as fast; its variation stays, but one minute then holds many bursts.
//! - **Load**: requests are drawn until their slot-seconds are the load times the capacity, and the arrivals are then
//!   stretched to the hours exactly. Seeds differ in their bursts and not in how much is asked for.
//! - **Users**: demand per user and day by its quantiles p50 54 s, p90 265, p95 483, p99 1977, log-linear between them.
//! - **Declared**: actual x (1 + exponential with mean 2/3), rounded up to 5 s.
//!
//! Two things are assumptions, for there is no measurement: which tiers the users have ([`TIERS`]), and how much of the
//! spread of durations lies between functions ([`Demand::between_functions`]).

use std::f64::consts::LN_2;

use spaceport_core::ids::Size;

use crate::random::Random;
use crate::request::{Request, Tier, Trace, User};

/// Median service time, seconds.
pub const SERVICE_MEDIAN_S: f64 = 23.0;
/// Mean service time of calls that do not fail, seconds.
pub const SERVICE_MEAN_S: f64 = 28.7;
/// Share of calls that fail.
pub const FAILURES: f64 = 0.015;
/// Median time of a call that fails, seconds.
pub const FAILURE_MEDIAN_S: f64 = 8.0;
/// Share of calls that ask for a whole card.
pub const WHOLE: f64 = 0.15;
/// Coefficient of variation of the inter-arrival times.
pub const ARRIVALS_CV: f64 = 12.0;
/// How much faster than the mean requests come in a burst.
pub const BURST_RATE: f64 = 80.0;
/// Rate between bursts, as a share of the mean rate.
pub const QUIET_RATE: f64 = 0.005;
/// Mean of the exponential part by which declared durations exceed actual ones.
pub const DECLARED_EXCESS: f64 = 2.0 / 3.0;
/// Declared durations are multiples of this, milliseconds.
pub const DECLARED_STEP_MS: u64 = 5000;
/// What a function without a duration declares, milliseconds.
pub const DECLARED_DEFAULT_MS: u64 = 60_000;
/// Users of each tier, of a hundred. An assumption.
pub const TIERS: [(Tier, usize); 4] = [(Tier::Guest, 25), (Tier::Free, 55), (Tier::Pro, 15), (Tier::Enterprise, 5)];

/// Demand per user and day: (standard normal score, slot-seconds) of p50, p90, p95 and p99.
const USER_DAY: [(f64, f64); 4] = [(0.0, 54.0), (1.281_55, 265.0), (1.644_85, 483.0), (2.326_35, 1977.0)];
/// Scores beyond this one are taken as this one, so that no single user is the whole demand: 10,000 s a day.
const USER_DAY_SCORE_MAX: f64 = 3.11;
/// Functions that the calls are of; the n-th is called 1/n as often as the first (Zipf).
const FUNCTIONS: usize = 50;
/// Requests among which the first one of a user is chosen.
const FIRST_CHOICE: usize = 2;
/// Requests drawn at most, whatever load and hours say: two orders of magnitude above what the figures need.
const REQUESTS_MAX: usize = 5_000_000;
const DAY_S: f64 = 86_400.0;

/// What to make up.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Demand {
    /// Asked slot-seconds over those there are.
    pub load: f64,
    /// How long requests come, hours.
    pub hours: f64,
    /// Halves of cards, all nodes together.
    pub slots: u64,
    /// What functions declare.
    pub declare: Declare,
    /// Share of the variance of the logarithm of durations that lies between functions, 0 to 1; the rest is within.
    pub between_functions: f64,
}

/// What functions declare.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Declare {
    /// What they need, to the millisecond.
    Exact,
    /// Too much, each by another factor.
    AsFitted,
    /// Nothing: 60 s count, and what is longer is killed.
    Default,
}

/// The two-state Poisson process; times in units of the mean inter-arrival time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bursts {
    /// Requests per unit in a burst.
    pub rate: f64,
    /// Requests per unit between bursts.
    pub quiet_rate: f64,
    /// Mean length of a burst.
    pub length: f64,
    /// Mean time between bursts.
    pub gap: f64,
}

// === impl Bursts ===

impl Bursts {
    /// The process with mean rate 1, these rates, and this coefficient of variation.
    ///
    /// With switching rates `a` (out of bursts) and `b` (into them) the squared coefficient of variation is
    /// `1 + 2ab(r - q)^2 / ((a + b)^2 (rq + rb + qa))` (Fischer and Meier-Hellstern, The Markov-modulated Poisson
    /// process cookbook, 1993). The mean rate fixes b/a, so one equation for `a` is left, and it is linear.
    pub fn fitted(rate: f64, quiet_rate: f64, variation: f64) -> Self {
        let share = (1.0 - quiet_rate) / (rate - quiet_rate);
        let spread = 2.0 * share * (1.0 - share) * (rate - quiet_rate).powi(2);
        let numerator = spread / (variation.powi(2) - 1.0) - rate * quiet_rate;
        let out = numerator / (rate * share / (1.0 - share) + quiet_rate);
        Self { rate, quiet_rate, length: 1.0 / out, gap: (1.0 - share) / share / out }
    }

    /// Arrival times of so many requests. The process starts in the state that it is in when a burst has just ended.
    fn arrivals(&self, random: &mut Random, count: usize) -> Vec<f64> {
        let mut times = Vec::with_capacity(count);
        let mut now = 0.0;
        let mut bursting = false;
        let mut switch_at = random.exponential(self.gap);
        // Each round either makes a request or switches, and a switch is followed by a request sooner or later: the
        // bound of `count` is the bound of this loop, with probability one.
        while times.len() < count {
            let rate = if bursting { self.rate } else { self.quiet_rate };
            let next = now + random.exponential(1.0 / rate);
            if next < switch_at {
                now = next;
                times.push(now);
            } else {
                now = switch_at;
                bursting = !bursting;
                switch_at = now + random.exponential(if bursting { self.length } else { self.gap });
            }
        }
        times
    }
}

// === impl Demand ===

impl Demand {
    /// The demand of a seed, as a trace.
    pub fn generate(&self, seed: u64) -> Trace {
        let mut random = Random::new(seed);
        let functions = Functions::draw(&mut random, self.between_functions);
        let wanted_ms = self.load * self.slots as f64 * self.hours * 3_600_000.0;
        let mut requests = Vec::new();
        let mut work_ms = 0.0;
        while work_ms < wanted_ms && requests.len() < REQUESTS_MAX {
            let request = self.request(&mut random, &functions);
            work_ms += (request.duration_ms * request.slots()) as f64;
            requests.push(request);
        }
        let bursts = Bursts::fitted(BURST_RATE, QUIET_RATE, ARRIVALS_CV);
        let times = bursts.arrivals(&mut random, requests.len());
        let stretch = self.hours * 3_600_000.0 / times.last().copied().unwrap_or(1.0);
        for (request, time) in requests.iter_mut().zip(times) {
            request.arrival_ms = (time * stretch).round() as u64;
        }
        let users = assign_users(&mut random, &mut requests);
        Trace { requests, users }
    }

    fn request(&self, random: &mut Random, functions: &Functions) -> Request {
        let (function, median) = functions.pick(random);
        let needed_s = median * (functions.within_sigma * random.normal()).exp();
        let factor = 1.0 + random.exponential(DECLARED_EXCESS);
        let fails = random.chance(FAILURES);
        let failed_s = FAILURE_MEDIAN_S * (service_sigma() * random.normal()).exp();
        let duration_ms = milliseconds(if fails { failed_s } else { needed_s });
        let declared_ms = match self.declare {
            Declare::Exact => duration_ms,
            // A call that fails late can outlast what it would have needed; nobody declares less than it takes.
            Declare::AsFitted => milliseconds(needed_s * factor).max(duration_ms).next_multiple_of(DECLARED_STEP_MS),
            Declare::Default => DECLARED_DEFAULT_MS,
        };
        let size = if random.chance(WHOLE) { Size::Xlarge } else { Size::Large };
        Request { arrival_ms: 0, duration_ms, declared_ms, size, user: 0, function: Some(function) }
    }
}

/// Functions with the medians of their durations.
struct Functions {
    medians_s: Vec<f64>,
    cumulated: Vec<f64>,
    within_sigma: f64,
}

impl Functions {
    /// Medians at evenly spaced probabilities in random order, so that no draw makes all calls long.
    fn draw(random: &mut Random, between: f64) -> Self {
        let between_sigma = service_sigma() * between.sqrt();
        let weights: Vec<f64> = (1..=FUNCTIONS).map(|rank| 1.0 / rank as f64).collect();
        let total: f64 = weights.iter().sum();
        let mut order: Vec<usize> = (0..FUNCTIONS).collect();
        random.shuffle(&mut order);
        let mut scores = vec![0.0; FUNCTIONS];
        let mut below = 0.0;
        // The probability that lies on each function is its own popularity: over calls, the medians are log-normal.
        for function in order {
            let share = weights[function] / total;
            scores[function] = normal_score(below + share / 2.0);
            below += share;
        }
        // Steps of unequal size lose a little of the variance; it is given back.
        let variance: f64 = scores.iter().zip(&weights).map(|(score, weight)| score * score * weight / total).sum();
        let mean: f64 = scores.iter().zip(&weights).map(|(score, weight)| score * weight / total).sum();
        let scale = between_sigma / (variance - mean * mean).sqrt();
        let medians_s = scores.iter().map(|score| SERVICE_MEDIAN_S * (scale * (score - mean)).exp()).collect();
        let cumulated = weights
            .iter()
            .scan(0.0, |sum, weight| {
                *sum += weight / total;
                Some(*sum)
            })
            .collect();
        Self { medians_s, cumulated, within_sigma: service_sigma() * (1.0 - between).sqrt() }
    }

    fn pick(&self, random: &mut Random) -> (u32, f64) {
        let point = random.unit();
        let index = self.cumulated.partition_point(|sum| *sum < point).min(FUNCTIONS - 1);
        (u32::try_from(index).unwrap_or(u32::MAX), self.medians_s[index])
    }
}

/// Of the logarithm of a log-normal time with our median and mean.
fn service_sigma() -> f64 {
    (2.0 * (SERVICE_MEAN_S / SERVICE_MEDIAN_S).ln()).sqrt()
}

fn milliseconds(seconds: f64) -> u64 {
    ((seconds * 1000.0).round() as u64).max(1)
}

/// The score below which a standard normal number falls with this probability, by Newton's method on the logistic
/// approximation: 1e-4 is exact enough for medians of functions.
fn normal_score(probability: f64) -> f64 {
    // Bowling and others, A logistic approximation to the cumulative normal distribution, 2009: error below 1.4e-4.
    let logit = |score: f64| 0.070_56 * score.powi(3) + 1.5976 * score;
    let target = (probability / (1.0 - probability)).ln();
    let mut score = target / (1.5976 + LN_2 / 4.0);
    // Newton on a monotonic cubic: it converges in a handful of steps.
    for _ in 0..20 {
        score -= (logit(score) - target) / (0.211_68 * score.powi(2) + 1.5976);
    }
    score
}

/// Hands requests out, in random order, to users until each has what a user-day asks for; each day has users anew.
fn assign_users(random: &mut Random, requests: &mut [Request]) -> Vec<User> {
    let mut users = Vec::new();
    let mut rest = requests;
    let mut day = 1.0;
    while !rest.is_empty() {
        let end_ms = day * DAY_S * 1000.0;
        let of_day = rest.partition_point(|request| (request.arrival_ms as f64) < end_ms).max(1);
        let (now, later) = rest.split_at_mut(of_day);
        assign_day(random, now, &mut users);
        rest = later;
        day += 1.0;
    }
    users
}

fn assign_day(random: &mut Random, requests: &mut [Request], users: &mut Vec<User>) {
    let mut order: Vec<usize> = (0..requests.len()).collect();
    random.shuffle(&mut order);
    let work_ms = |request: &Request| (request.served_ms() * request.slots()) as f64;
    let mut left_ms = 0.0;
    let mut begun = false;
    for position in 0..order.len() {
        // A request that does not fit half into what is left belongs to the next user: sums are right on average.
        if !begun || left_ms < work_ms(&requests[order[position]]) / 2.0 {
            left_ms = user_day_s(random.normal()) * 1000.0;
            begun = true;
            users.push(User { name: format!("u{}", users.len() + 1), tier: draw_tier(random) });
            // Who asks for little asks for something short, or else nobody would have such a day.
            let near = &order[position..order.len().min(position + FIRST_CHOICE)];
            let distance = |index: &usize| (work_ms(&requests[*index]) - left_ms).max(0.0);
            let nearest = near.iter().enumerate().min_by(|(_, a), (_, b)| distance(a).total_cmp(&distance(b)));
            let offset = nearest.map_or(0, |(offset, _)| offset);
            order.swap(position, position + offset);
        }
        let request = &mut requests[order[position]];
        left_ms -= work_ms(request);
        request.user = users.len() - 1;
    }
}

fn draw_tier(random: &mut Random) -> Tier {
    let total: usize = TIERS.iter().map(|(_, share)| share).sum();
    let mut point = random.below(total);
    for (tier, share) in TIERS {
        if point < share {
            return tier;
        }
        point -= share;
    }
    Tier::Free
}

/// Slot-seconds a day of the user at this standard normal score: straight lines between the known quantiles, in the
/// logarithm, the first and the last of them going on.
fn user_day_s(score: f64) -> f64 {
    let score = score.min(USER_DAY_SCORE_MAX);
    let segment = USER_DAY[1..].iter().position(|(upper, _)| score <= *upper).unwrap_or(USER_DAY.len() - 2);
    let ((from, low), (to, high)) = (USER_DAY[segment], USER_DAY[segment + 1]);
    low * ((score - from) / (to - from) * (high / low).ln()).exp()
}

#[cfg(test)]
mod tests;
