package main

import (
	"fmt"
	"net/url"
	"strconv"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"tidemark/proxy/admin"
)

func newNotifyAlerts() *cobra.Command {
	c := &cobra.Command{
		Use:   "alerts",
		Short: "List what is open: held, against the policy, not signed any more, deleted",
		Long: `List the alerts that are open, newest first: tags that are held or moved against the
policy, that lost a signature or provenance, that upstream deleted. Each is open until
another entry of the log ends it.`,
		Example: "  tidemark notify alerts\n  tidemark notify alerts --all",
		Args:    cobra.NoArgs,
	}
	var all bool
	c.Flags().BoolVar(&all, "all", false, "those that are over, too")
	cl, asJSON := addClient(c), addJSON(c)
	c.RunE = func(c *cobra.Command, _ []string) error {
		var out admin.Alerts
		if err := cl.getJSON(c.Context(), "/api/v1/alerts", url.Values{"all": {strconv.FormatBool(all)}}, &out); err != nil {
			return err
		}
		if *asJSON {
			return printJSON(c, out)
		}
		if len(out.Alerts) == 0 {
			fmt.Fprintln(c.OutOrStdout(), "nothing is open")
			return nil
		}
		w := tabwriter.NewWriter(c.OutOrStdout(), 0, 0, 2, ' ', 0)
		fmt.Fprintln(w, "INDEX\tTYPE\tREF\tDIGEST\tSINCE\tSTATE")
		for _, a := range out.Alerts {
			state := "open"
			if a.Acknowledged != nil {
				state = "acknowledged " + since(*a.Acknowledged, time.Now())
			}
			if a.Resolved != nil {
				state = fmt.Sprintf("ended by %s %s", a.ResolvedBy, since(*a.Resolved, time.Now()))
			}
			fmt.Fprintf(w, "%d\t%s\t%s\t%s\t%s\t%s\n", a.Index, a.Type, a.Ref, short(a.Digest), since(a.Opened, time.Now()), state)
		}
		return w.Flush()
	}
	return c
}

func newNotifyAck() *cobra.Command {
	c := &cobra.Command{
		Use:   "ack INDEX",
		Short: "Say that somebody knows of an alert: nobody is reminded of it any more",
		Long: `Say that somebody knows of an alert, by the index that notify alerts and every message
has: nobody is reminded of it any more. That is an entry of the log. It decides nothing:
what is held stays held.`,
		Example: "  tidemark notify ack 1042 --reason \"asked the publisher\"",
		Args:    cobra.ExactArgs(1),
	}
	var in admin.Acknowledgement
	c.Flags().StringVar(&in.Reason, "reason", "", "what is recorded with it")
	cl, asJSON := addClient(c), addJSON(c)
	c.RunE = func(c *cobra.Command, args []string) error {
		index, err := parseIndex(args[0])
		if err != nil {
			return err
		}
		in.Index = &index
		var out admin.Alert
		if err := cl.postJSON(c.Context(), "/api/v1/alerts/acknowledge", in, &out); err != nil {
			return err
		}
		if *asJSON {
			return printJSON(c, out)
		}
		fmt.Fprintf(c.OutOrStdout(), "%s of %s is acknowledged\n", out.Type, out.Ref)
		return nil
	}
	return c
}

func newNotifyMute() *cobra.Command {
	c := &cobra.Command{
		Use:   "mute [PATTERN]",
		Short: "Have nobody told of some tags for a while, or list what is muted",
		Long: `Have nobody told of the tags of a pattern for a while, whatever happens to them. That
is an entry of the log, and so is all that happens meanwhile; notify replay tells it
afterwards. Without a pattern it lists what is muted.`,
		Example: "  tidemark notify mute 'docker.io/acme/**' --for 8h --reason \"moving the registry\"\n  tidemark notify mute",
		Args:    cobra.MaximumNArgs(1),
	}
	var in admin.Mute
	var d time.Duration
	c.Flags().DurationVar(&d, "for", 0, "for how long, such as 8h")
	c.Flags().StringVar(&in.Reason, "reason", "", "why")
	cl, asJSON := addClient(c), addJSON(c)
	c.RunE = func(c *cobra.Command, args []string) error {
		if len(args) == 0 {
			return listMutes(c, cl, *asJSON)
		}
		if d <= 0 || in.Reason == "" {
			return usage(fmt.Errorf("--for and --reason are needed"))
		}
		in.Match, in.Until = args[0], time.Now().Add(d).UTC().Truncate(time.Second)
		var out admin.Mute
		if err := cl.postJSON(c.Context(), "/api/v1/mutes", in, &out); err != nil {
			return err
		}
		if *asJSON {
			return printJSON(c, out)
		}
		fmt.Fprintf(c.OutOrStdout(), "nobody is told of %s until %s\n", out.Match, stamp(out.Until))
		return nil
	}
	return c
}

func listMutes(c *cobra.Command, cl *client, asJSON bool) error {
	var out admin.Mutes
	if err := cl.getJSON(c.Context(), "/api/v1/mutes", nil, &out); err != nil {
		return err
	}
	if asJSON {
		return printJSON(c, out)
	}
	if len(out.Mutes) == 0 {
		fmt.Fprintln(c.OutOrStdout(), "nothing is muted")
		return nil
	}
	w := tabwriter.NewWriter(c.OutOrStdout(), 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "PATTERN\tUNTIL\tREASON")
	for _, m := range out.Mutes {
		fmt.Fprintf(w, "%s\t%s\t%s\n", m.Match, stamp(m.Until), printable(m.Reason))
	}
	return w.Flush()
}

func newNotifyUnmute() *cobra.Command {
	c := &cobra.Command{
		Use:     "unmute PATTERN",
		Short:   "Take a mute back",
		Example: "  tidemark notify unmute 'docker.io/acme/**'",
		Args:    cobra.ExactArgs(1),
	}
	cl, asJSON := addClient(c), addJSON(c)
	c.RunE = func(c *cobra.Command, args []string) error {
		var out admin.Unmute
		if err := cl.postJSON(c.Context(), "/api/v1/mutes/remove", admin.Unmute{Match: args[0]}, &out); err != nil {
			return err
		}
		if *asJSON {
			return printJSON(c, out)
		}
		fmt.Fprintf(c.OutOrStdout(), "%s is told of again\n", out.Match)
		return nil
	}
	return c
}
