//! The scenarios, by number. A scenario that needs no guest of its own uses the one that the previous scenario left,
//! settled on some image.

use std::future::Future;
use std::pin::Pin;

use anyhow::Result;

use crate::backend::Backend;
use crate::lab::{Kind, Lab, Stock};

mod arguments;
mod bootc;
mod faults;
mod guest;
mod neighbours;
mod overlay;
mod power;
mod prefetch;
mod refusal;
mod selinux;
mod soak;
mod update;
mod writes;

type Done<'a> = Pin<Box<dyn Future<Output = Result<()>> + 'a>>;
type WithLab = for<'a> fn(&'a mut Lab) -> Done<'a>;

/// The function of a scenario, and its guest.
#[derive(Clone, Copy)]
pub enum Run {
    /// Any settled guest; the scenario leaves it settled.
    Shared(WithLab),
    /// A new guest of that kind, which no later scenario uses.
    Own(Kind, WithLab),
    /// Any number of guests, which the scenario starts.
    Itself(for<'a> fn(&'a Stock) -> Done<'a>),
}

/// One scenario.
pub struct Scenario {
    /// Its number; they run in this order.
    pub number: u32,
    /// Its name.
    pub name: &'static str,
    /// Its title.
    pub about: &'static str,
    /// Whether every change must pass it.
    pub short: bool,
    /// Whether it runs only when it is named.
    pub on_demand: bool,
    /// The only backend that it applies to, if any.
    pub only: Option<Backend>,
    /// Why it cannot be run with this stock, if it cannot.
    pub skip: fn(&Stock) -> Option<&'static str>,
    /// Its function.
    pub run: Run,
}

const fn scenario(number: u32, name: &'static str, about: &'static str, run: WithLab) -> Scenario {
    Scenario { number, name, about, short: false, on_demand: false, only: None, skip: |_| None, run: Run::Shared(run) }
}

impl Scenario {
    const fn short(self) -> Self {
        Self { short: true, ..self }
    }

    const fn own(self, kind: Kind) -> Self {
        match self.run {
            Run::Shared(run) | Run::Own(_, run) => Self { run: Run::Own(kind, run), ..self },
            Run::Itself(_) => self,
        }
    }

    const fn on_demand(self) -> Self {
        Self { on_demand: true, ..self }
    }

    const fn only(self, backend: Backend) -> Self {
        Self { only: Some(backend), ..self }
    }

    const fn skip(self, skip: fn(&Stock) -> Option<&'static str>) -> Self {
        Self { skip, ..self }
    }
}

/// All scenarios, in order.
pub const ALL: &[Scenario] = &[
    scenario(0, "guest", "the guest boots a deployment, no unit fails, and Landlock is in force", |lab| {
        Box::pin(guest::is_what_it_claims(lab))
    })
    .short(),
    scenario(1, "update", "a signed image is staged, booted after a drain and reported", |lab| {
        Box::pin(update::forward(lab))
    })
    .short(),
    scenario(2, "unsigned", "an unsigned image is refused by agent and pull; nothing changes", |lab| {
        Box::pin(refusal::unsigned(lab))
    })
    .short(),
    scenario(3, "strange-key", "an image signed with a key that the policy does not name is refused", |lab| {
        Box::pin(refusal::strange_key(lab))
    })
    .short(),
    scenario(4, "back", "the pool goes back to the previous image", |lab| Box::pin(update::back(lab))),
    scenario(5, "index", "the target's digest is that of an index", |lab| Box::pin(neighbours::index_digest(lab))),
    scenario(6, "power-staged", "a power cut after staging", |lab| Box::pin(power::after_staging(lab))),
    scenario(7, "power-attempt", "a power cut after the attempt is recorded", |lab| {
        Box::pin(power::after_the_attempt(lab))
    })
    .short(),
    scenario(8, "power-finalizing", "a power cut during finalization", |lab| Box::pin(power::during_finalization(lab))),
    scenario(9, "finalization-fails", "/boot cannot be written: two attempts, then a refusal with the cause", |lab| {
        Box::pin(power::finalization_fails(lab))
    }),
    scenario(10, "registry-gone", "the registry dies in the middle of a layer", |lab| {
        Box::pin(neighbours::registry_gone(lab))
    }),
    scenario(11, "api-gone", "the API server is away while the new image boots", |lab| {
        Box::pin(neighbours::api_gone_at_boot(lab))
    }),
    scenario(
        12,
        "certificate",
        "the kubelet's certificate expires in the middle of an update and is replaced",
        |lab| Box::pin(neighbours::certificate_rotates(lab)),
    ),
    scenario(13, "human", "a foreign image is staged by hand, twice", |lab| Box::pin(neighbours::human_deploys(lab))),
    scenario(14, "retarget", "the target changes while an image is pulled", |lab| Box::pin(neighbours::retarget(lab))),
    scenario(15, "self-update", "the image contains another agent, which reports the update", |lab| {
        Box::pin(update::of_the_agent(lab))
    }),
    scenario(16, "key-rotation", "the image contains the key for the next image", |lab| {
        Box::pin(refusal::key_rotation(lab))
    }),
    scenario(17, "writes", "the agent opens no file for writing in a whole update", |lab| Box::pin(writes::none(lab))),
    scenario(18, "finalizer-late", "the finalizer cannot start: no drain, no reboot", |lab| {
        Box::pin(neighbours::finalizer_late(lab))
    })
    .short(),
    scenario(19, "no-effect", "a transaction reports success and staged nothing: an error", |lab| {
        Box::pin(neighbours::no_effect(lab))
    })
    .skip(neighbours::cannot_change_nothing),
    scenario(20, "selinux", "one update with SELinux enforcing for the agent's domain, without a denial", |lab| {
        Box::pin(selinux::update(lab))
    })
    .own(Kind::Selinux),
    Scenario {
        number: 21,
        name: "faults",
        about: "each deliberate fault of the agent is found by its scenario",
        short: false,
        on_demand: false,
        only: None,
        skip: |_| None,
        run: Run::Itself(|stock| Box::pin(faults::are_caught(stock))),
    },
    scenario(22, "bootc-signed", "bootc enforces a policy that rejects by default, and the origin is signed", |lab| {
        Box::pin(bootc::signed(lab))
    })
    .own(Kind::Plain)
    .only(Backend::Bootc),
    Scenario {
        number: 23,
        name: "overlay",
        about: "the host tool of an overlay replaces the stand-in",
        short: false,
        on_demand: false,
        only: None,
        skip: |stock| stock.has_overlay().then_some("this run has an overlay of its own"),
        run: Run::Itself(|stock| Box::pin(overlay::is_used(stock))),
    },
    scenario(24, "power-back", "a power cut after the attempt to go back is recorded", |lab| {
        Box::pin(power::on_the_way_back(lab))
    }),
    scenario(25, "staged-refused", "the policy rejects a staged image: it is dropped or reported", |lab| {
        Box::pin(refusal::staged_then_refused(lab))
    }),
    scenario(26, "policy-replaced", "the policy changes between staging and reboot, with the same mtime", |lab| {
        Box::pin(refusal::policy_replaced_while_draining(lab))
    }),
    scenario(27, "kernel-arguments", "quoted and ordered kernel arguments reach the kernel as configured", |lab| {
        Box::pin(arguments::in_order(lab))
    })
    .own(Kind::Plain)
    .only(Backend::RpmOstree),
    scenario(28, "no-arguments", "a foreign image is staged by hand, without kernel arguments", |lab| {
        Box::pin(neighbours::staged_without_arguments(lab))
    }),
    scenario(29, "locked", "the desired image was staged by hand and its finalization is locked", |lab| {
        Box::pin(neighbours::staged_locked(lab))
    })
    .only(Backend::RpmOstree),
    scenario(30, "prefetch", "the image is pulled before the node's turn; at its turn the registry is away", |lab| {
        Box::pin(prefetch::before_the_turn(lab))
    }),
    scenario(31, "prefetch-withdrawn", "the hint is withdrawn while its image is pulled", |lab| {
        Box::pin(prefetch::withdrawn(lab))
    }),
    scenario(32, "held-reboots", "a held node is rebooted by hand and loses power: the old image boots", |lab| {
        Box::pin(prefetch::held(lab))
    }),
    scenario(33, "locked-reboots", "a staged node is rebooted by hand before its drain: the old image boots", |lab| {
        Box::pin(prefetch::locked(lab))
    })
    .only(Backend::RpmOstree),
    scenario(34, "power-unlocked", "a power cut after the staged deployment is unlocked", |lab| {
        Box::pin(prefetch::cut_after_unlocking(lab))
    })
    .only(Backend::RpmOstree),
    scenario(90, "soak", "ten updates back to back leave nothing behind", |lab| Box::pin(soak::ten(lab)))
        .own(Kind::Plain)
        .on_demand(),
];
