package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"tidemark/audit"
	"tidemark/audit/sqlite"
	"tidemark/config"
)

// newFork is a subcommand of log: it is about the log itself.
func newFork() *cobra.Command {
	var path, data, reason string
	var force bool
	c := &cobra.Command{
		Use:   "fork --reason R",
		Short: "Go on under a new name after the log was rolled back, or its key was lost",
		Long: `Have the log go on under a new origin and a new key. That is for a log that does
not contain what was signed before, because an older database was restored, or
whose key is lost: it cannot be signed under its old name any more, since whoever
kept a checkpoint would find it broken. The first new entry says what happened,
and why. Old key, verifier and anchor are kept beside the new ones.

A log that contains what the file anchor says is refused, unless --force says that
the anchor is from the backup, too, and knows no better.

The server must be stopped. Give the new log.vkey to whoever checks the log.`,
		Example: `  tidemark log fork --data /var/lib/tidemark --reason "restored the backup of Monday after the disk died"`,
		Args:    cobra.NoArgs, DisableFlagsInUseLine: true,
	}
	c.Flags().StringVarP(&path, "config", "c", "", "configuration file of the server")
	c.Flags().StringVar(&data, "data", "", "folder of all state (data)")
	c.Flags().StringVar(&reason, "reason", "", "why; it is recorded in the log")
	c.Flags().BoolVar(&force, "force", false, "fork a log that looks well: its anchor was restored with it")
	c.RunE = func(c *cobra.Command, _ []string) (err error) {
		if reason == "" {
			return usage(errors.New("a fork needs its --reason: it is recorded"))
		}
		cfg, err := loadConfig(path, func(cfg *config.Config) {
			if data != "" {
				cfg.Data = data
			}
		})
		if err != nil {
			return err
		}
		if _, err := os.Stat(filepath.Join(cfg.Data, "audit.db")); err != nil {
			return usage(fmt.Errorf("no ledger to fork in %q; --data or -c says where it is: %w", cfg.Data, err))
		}
		folder, err := openData(cfg.Data)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, folder.Close()) }()
		store, err := sqlite.Open(c.Context(), folder.file("audit.db"), audit.NewOrigin())
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, store.Close()) }()
		origin, err := audit.Fork(c.Context(), folder.path, store, reason, force, time.Now())
		if errors.Is(err, audit.ErrNoFork) {
			return fmt.Errorf("%w; if its anchor was restored from a backup with it, say --force", err)
		}
		if err != nil {
			return err
		}
		fmt.Fprintf(c.OutOrStdout(), "the log goes on as %s\n  verifier  %s\n", origin, folder.file("log.vkey"))
		if cfg.Audit.Origin != "" {
			fmt.Fprintln(c.OutOrStdout(), "  take audit.origin out of the configuration: it names the old log")
		}
		return nil
	}
	return c
}
