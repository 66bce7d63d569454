assign q = a + 1; // $finish tb.q_ref `include
/* $stop */ initial $display("$finish");
endmodule
