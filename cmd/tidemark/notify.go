package main

import (
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"tidemark/proxy/admin"
)

func newNotify() *cobra.Command {
	c := &cobra.Command{
		Use:   "notify",
		Short: "What is told to whom: try it, tell again, see what is open, mute",
		Long:  "Try the places that are told of what happens to tags, those of notify in the\nconfiguration; tell them again; see what is open, acknowledge and mute it.\ndocs/alerts.md has what they are told, and when.",
	}
	c.AddCommand(newNotifyTest(), newNotifyPreview(), newNotifyReplay(), newNotifyAlerts(), newNotifyAck(), newNotifyMute(), newNotifyUnmute())
	return c
}

func newNotifyTest() *cobra.Command {
	c := &cobra.Command{
		Use:   "test",
		Short: "Send a sample to a sink, at once",
		Long: `Send a sample to a sink of the running server, at once and past the outbox. The
sample kics is an incident: five tags of an image overwritten within minutes;
move is one tag that moved.`,
		Example: "  tidemark notify test --sink ops\n  tidemark notify test --sink ops --event move",
		Args:    cobra.NoArgs,
	}
	var in admin.NotifyTest
	c.Flags().StringVar(&in.Sink, "sink", "", "name of the sink in the configuration")
	c.Flags().StringVar(&in.Sample, "event", "kics", "what to send: kics or move")
	cl, asJSON := addClient(c), addJSON(c)
	c.RunE = func(c *cobra.Command, _ []string) error {
		if in.Sink == "" {
			return usage(fmt.Errorf("--sink is missing"))
		}
		var out admin.NotifyResult
		if err := cl.postJSON(c.Context(), "/api/v1/notify/test", in, &out); err != nil {
			return err
		}
		if *asJSON {
			return printJSON(c, out)
		}
		fmt.Fprintf(c.OutOrStdout(), "%s took it\n", out.Sink)
		return nil
	}
	return c
}

func newNotifyReplay() *cobra.Command {
	c := &cobra.Command{
		Use:   "replay",
		Short: "Tell a sink again of what was recorded",
		Long: `Have a sink told again, or for the first time, of what was recorded since a time
or in the last so long, as far as the configuration has it told of such things.
What it did not take before is tried anew.`,
		Example: "  tidemark notify replay --sink ops --since 24h\n  tidemark notify replay --sink ops --since 2026-07-01",
		Args:    cobra.NoArgs,
	}
	var sink, since string
	c.Flags().StringVar(&sink, "sink", "", "name of the sink in the configuration")
	c.Flags().StringVar(&since, "since", "", "a date, a time, or how long ago")
	cl, asJSON := addClient(c), addJSON(c)
	c.RunE = func(c *cobra.Command, _ []string) error {
		if sink == "" || since == "" {
			return usage(fmt.Errorf("--sink and --since are needed"))
		}
		text, err := ago(since, time.Now())
		if err != nil {
			return usage(fmt.Errorf("--since: %w", err))
		}
		at, err := time.Parse(time.RFC3339, text)
		if err != nil {
			return usage(fmt.Errorf("--since: %w", err))
		}
		var out admin.NotifyResult
		if err := cl.postJSON(c.Context(), "/api/v1/notify/replay", admin.NotifyReplay{Sink: sink, Since: &at}, &out); err != nil {
			return err
		}
		if *asJSON {
			return printJSON(c, out)
		}
		fmt.Fprintf(c.OutOrStdout(), "%s will be told of %d events\n", out.Sink, out.Events)
		return nil
	}
	return c
}

func newNotifyPreview() *cobra.Command {
	c := &cobra.Command{
		Use:   "preview [INDEX]",
		Short: "Show what a sink would be told, and send nothing",
		Long: `Show what a sink of the running server would be told of an entry of the log, or of a
sample, in the words of its templates, and send nothing.`,
		Example: "  tidemark notify preview --sink ops 1042\n  tidemark notify preview --sink ops --event move",
		Args:    cobra.MaximumNArgs(1),
	}
	var in admin.NotifyPreview
	c.Flags().StringVar(&in.Sink, "sink", "", "name of the sink in the configuration")
	c.Flags().StringVar(&in.Sample, "event", "kics", "without an INDEX: kics or move")
	cl, asJSON := addClient(c), addJSON(c)
	c.RunE = func(c *cobra.Command, args []string) error {
		if in.Sink == "" {
			return usage(fmt.Errorf("--sink is missing"))
		}
		if len(args) > 0 {
			index, err := parseIndex(args[0])
			if err != nil {
				return err
			}
			in.Index = &index
		}
		var out admin.NotifyText
		if err := cl.postJSON(c.Context(), "/api/v1/notify/preview", in, &out); err != nil {
			return err
		}
		if *asJSON {
			return printJSON(c, out)
		}
		fmt.Fprintf(c.OutOrStdout(), "%s\n\n%s\n", out.Title, out.Text)
		return nil
	}
	return c
}
