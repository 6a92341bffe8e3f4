package main

import (
	"fmt"

	"github.com/spf13/cobra"
)

func newCheck() *cobra.Command {
	var path string
	c := &cobra.Command{
		Use:   "check",
		Short: "Validate a configuration and print what it means",
		Long: `Validate a configuration: every error at once, with its path, line and excerpt.
Then print the effective configuration, with every default and secrets masked, and
the policy that its rules and preset make.
Nothing is dialled and nothing is written.`,
		Example: "  tidemark check -c /etc/tidemark.yaml",
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 0 {
				return fmt.Errorf("the file is named with -c: tidemark check -c %s", args[0])
			}
			return nil
		},
		RunE: func(c *cobra.Command, _ []string) error {
			cfg, err := loadConfig(path, nil)
			if err != nil {
				return err
			}
			policy, errs := policyOf(cfg)
			if len(errs) > 0 {
				return usage(errs[0])
			}
			fmt.Fprint(c.OutOrStdout(), cfg)
			fmt.Fprintf(c.OutOrStdout(), "\n# The policy that this makes: the first rule that matches counts.\n# sha256 %s\n", policy.SHA256())
			for _, r := range policy.Rules() {
				fmt.Fprintf(c.OutOrStdout(), "#   %s\n", r)
			}
			return nil
		},
	}
	c.Flags().StringVarP(&path, "config", "c", "", "configuration file; without one, the defaults are shown")
	return c
}
