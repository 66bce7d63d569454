assign q = $root.tb.q_ref;
endmodule
