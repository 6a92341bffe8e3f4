package main

import (
	"fmt"
	"io"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"

	"tidemark/audit"
	"tidemark/proxy/admin"
)

// The commands by which operators decide. Each is an event, and needs its reason.

func newHold() *cobra.Command {
	return newDecision(audit.HoldAt, "hold REF [DIGEST]", "Keep what a tag serves, or an earlier digest of it, until release", `Keep what a tag serves, or serve an earlier digest of it again, until it is
released. Moves of the tag upstream go on being recorded. The decision is an
event of the ledger, with its reason.`,
		`  tidemark hold nginx:1.27 --reason "1.27.6 breaks our config"
  tidemark hold nginx:1.27 sha256:4a5d… --reason "back to the one from May"`, cobra.RangeArgs(1, 2))
}

func newApprove() *cobra.Command {
	return newDecision(audit.Approve, "approve REF DIGEST", "Serve the digest that a rule holds back", `Serve the digest that a rule holds back. Only the one that is pending now can be
approved: if the tag has moved again, the approval is refused and names it. So it
is when its bytes cannot be had: what is not here of it is fetched first.`,
		`  tidemark approve nginx:latest sha256:4a5d… --reason "release notes read"`, cobra.ExactArgs(2))
}

func newReject() *cobra.Command {
	return newDecision(audit.Reject, "reject REF DIGEST", "Never serve the digest that a rule holds back", `Never serve the digest that a rule holds back, however old it gets. What the tag
means next is decided anew.`,
		`  tidemark reject nginx:latest sha256:4a5d… --reason "ships a miner"`, cobra.ExactArgs(2))
}

func newRelease() *cobra.Command {
	return newDecision(audit.Release, "release REF", "Take back a hold by hand", `Take back what hold did: from here on the rules decide again. What a rule holds
is approved or rejected instead.`,
		`  tidemark release nginx:1.27 --reason "1.27.7 is out"`, cobra.ExactArgs(1))
}

func newDecision(action, use, short, long, example string, args cobra.PositionalArgs) *cobra.Command {
	var reason string
	c := &cobra.Command{Use: use + " --reason R", Short: short, Long: long, Example: example, Args: args, DisableFlagsInUseLine: true}
	cl, asJSON := addClient(c), addJSON(c)
	c.Flags().StringVar(&reason, "reason", "", "why; it is recorded with the decision")
	c.RunE = func(c *cobra.Command, args []string) error {
		ref, err := expandRef(args[0])
		if err != nil {
			return err
		}
		if reason == "" {
			return usage(fmt.Errorf("a decision needs its --reason: it is recorded"))
		}
		d := admin.Decision{Ref: ref.String(), Reason: reason}
		if len(args) > 1 {
			if _, err := digest.Parse(args[1]); err != nil {
				return usage(fmt.Errorf("%q is not a digest: %w", args[1], err))
			}
			d.Digest = args[1]
		}
		var t admin.Tag
		if err := cl.postJSON(c.Context(), "/api/v1/tags/"+action, d, &t); err != nil {
			return err
		}
		if *asJSON {
			return printJSON(c, t)
		}
		printTag(c.OutOrStdout(), t)
		return nil
	}
	return c
}

// printTag says what a tag means and what of it is held back.
func printTag(w io.Writer, t admin.Tag) {
	fmt.Fprintf(w, "%s\n  serves   %s\n", t.Ref, orNothing(t.Served.String()))
	if t.Head != t.Served {
		fmt.Fprintf(w, "  upstream %s, since %s\n", t.Head, stamp(t.HeadSince))
	}
	if t.Held != nil {
		fmt.Fprintf(w, "  held     since %s: %s\n", stamp(t.Held.Since), heldFor(*t.Held, time.Now()))
	}
	if t.Deleted != nil {
		fmt.Fprintf(w, "  deleted  upstream, seen %s\n", stamp(*t.Deleted))
	}
	rule := t.Rule
	if rule == "" {
		rule = "(none matches)"
	}
	fmt.Fprintf(w, "  rule     %s: %s\n  event    %d\n", rule, t.Mode, t.Index)
}

// heldFor says why something is held, and for how long if nothing happens.
func heldFor(h admin.Held, now time.Time) string {
	why := printable(h.Reason)
	if h.ByHand {
		why = "by hand: " + why
	}
	switch {
	case h.Until == nil:
		return why
	case h.Until.Before(now):
		return why + ", until the next pull"
	}
	return why + ", until " + stamp(*h.Until)
}

func orNothing(d string) string {
	if d == "" {
		return "nothing"
	}
	return d
}
